"""Token divergences from hidden states: time and memory of `functional.chunked` beside dense torch and peers.

Every variant computes the mean over N tokens and its gradient at the student's hidden states and output
weight. Variants take turns within a round, so that load on the machine hits all alike; `--clock cpu` counts
processor seconds of all threads, to be trusted on a busy machine (with one thread). Peak memory is the rise
of the process's resident set (on CUDA, of the allocator's peak) during one run in a process of its own, less
the two gradients. `four products` are the matrix products that nobody can leave out, alone. Liger
(`liger-kernel`) and TRL are optional.

    python tools/bench_tokens.py --divergences js,forward_kl --tokens 1024 --hidden 256 --vocabulary 32000
        --rounds 5 --seeds 0,1 --threads 2 --device cpu --json FILE
"""

import argparse
import ctypes
import importlib
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.functional import DIVERGENCES, Unembed, chunked

PRODUCTS, DENSE, CHUNKED = "four products", "dense", "chunked"
TRL_BETA = {"forward_kl": 0.0, "js": 0.5, "reverse_kl": 1.0}


@dataclass(frozen=True)
class Case:
    divergence: str
    tokens: int
    hidden: int
    vocabulary: int
    chunk: int | None
    liger_chunk: int
    device: str
    dtype: str
    threads: int
    clock: str

    def shortened(self) -> "Case":
        """For warming up."""
        return replace(self, tokens=8)


@dataclass
class Inputs:
    student: Unembed
    teacher: Unembed
    target: Tensor

    def clear(self) -> None:
        self.student.hidden.grad = self.student.weight.grad = None


Variant = Callable[[Case, Inputs], float]


def make_inputs(case: Case, seed: int) -> Inputs:
    """Logits of both sides have a standard deviation near 1.5: a spread that a language model's have too."""
    rng = torch.Generator().manual_seed(seed)
    kind = {"device": case.device, "dtype": getattr(torch, case.dtype)}

    def side() -> Unembed:
        hidden = torch.randn(case.tokens, case.hidden, generator=rng)
        weight = torch.randn(case.vocabulary, case.hidden, generator=rng) * (1.5 / case.hidden**0.5)
        return Unembed(hidden.to(**kind), weight.to(**kind))

    student, teacher = side(), side()
    target = torch.randint(0, case.vocabulary, (case.tokens,), generator=rng).to(case.device)
    return Inputs(Unembed(student.hidden.requires_grad_(), student.weight.requires_grad_()), teacher, target)


def four_products(case: Case, x: Inputs) -> float:
    with torch.no_grad():
        logits = x.student.hidden @ x.student.weight.t()
        _ = x.teacher.hidden @ x.teacher.weight.t()
        x.student.hidden.grad = logits @ x.student.weight
        x.student.weight.grad = logits.t() @ x.student.hidden
    return math.nan


def dense(case: Case, x: Inputs) -> float:
    """As it is usually written; divergences other than these three by kdcore's functions, on all logits."""
    zs, zt = (side.hidden @ side.weight.t() for side in (x.student, x.teacher))
    log_q, log_p = F.log_softmax(zs.float(), -1), F.log_softmax(zt.float(), -1)

    def kl(log_target: Tensor, log_input: Tensor) -> Tensor:
        return F.kl_div(log_input, log_target, reduction="none", log_target=True).sum(-1)

    if case.divergence == "forward_kl":
        values = kl(log_p, log_q)
    elif case.divergence == "reverse_kl":
        values = kl(log_q, log_p)
    elif case.divergence == "js":
        log_m = torch.logsumexp(torch.stack([log_q, log_p]) - math.log(2), 0)
        values = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    else:
        del log_q, log_p
        values = DIVERGENCES[case.divergence](zs, zt, **_extra(case, x))
    return _backward(values.mean())


def ours(case: Case, x: Inputs) -> float:
    fn = DIVERGENCES[case.divergence]
    values = chunked(fn, x.student, x.teacher, per_token=_extra(case, x), chunk_size=case.chunk)
    return _backward(values.mean())


def liger(case: Case, x: Inputs) -> float:
    module = importlib.import_module("liger_kernel.chunked_loss")
    compiled = case.device == "cuda"  # its default; needs a compiler, which a CPU run may lack
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compiled, chunk_size=case.liger_chunk
    )
    return _backward(loss(x.student.hidden, x.student.weight, x.teacher.hidden, x.teacher.weight, x.target))


def trl(case: Case, x: Inputs) -> float:
    module = importlib.import_module("trl.kernels.chunked_divergence")
    sides = (x.student.hidden, x.student.weight, None, x.teacher.hidden, x.teacher.weight, None)
    values, _ = module.ChunkedDivergenceFunction.apply(*sides, TRL_BETA[case.divergence])
    return _backward(values.mean())


def _extra(case: Case, x: Inputs) -> dict[str, Tensor]:
    return {"target": x.target} if case.divergence == "decoupled_kl" else {}


def _backward(loss: Tensor) -> float:
    loss.backward()
    return loss.item()


def variants(case: Case) -> dict[str, Variant]:
    found: dict[str, Variant] = {PRODUCTS: four_products, DENSE: dense, CHUNKED: ours}
    if case.divergence == "js" and _importable("liger_kernel.chunked_loss"):
        found["liger"] = liger
    if case.divergence in ("forward_kl", "js", "reverse_kl") and _importable(
        "trl.kernels.chunked_divergence"
    ):
        found["trl"] = trl
    return found


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def seconds(case: Case, run: Variant, x: Inputs) -> float:
    x.clear()
    clock = time.process_time if case.clock == "cpu" else time.perf_counter
    _synchronise(case)
    start = clock()
    run(case, x)
    _synchronise(case)
    return clock() - start


def _synchronise(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def reference(case: Case, x: Inputs, rows: int = 64) -> tuple[float, Tensor, Tensor]:
    """Loss and both gradients in float64 by autograd, a few rows at a time."""
    exact = [
        Unembed(side.hidden.detach().double(), side.weight.detach().double())
        for side in (x.student, x.teacher)
    ]
    hidden, weight = (leaf.requires_grad_() for leaf in exact[0][:2])
    total = 0.0
    for start in range(0, case.tokens, rows):
        cut = slice(start, start + rows)
        extra = {name: value[cut] for name, value in _extra(case, x).items()}
        logits = (side._replace(hidden=side.hidden[cut]).logits() for side in exact)
        total += _backward(DIVERGENCES[case.divergence](*logits, **extra).sum() / case.tokens)
    return total, cast(Tensor, hidden.grad), cast(Tensor, weight.grad)


def errors(case: Case, x: Inputs) -> dict[str, dict[str, float]]:
    """Relative distance from float64 of the loss and of the two gradients (norms), for two variants."""
    exact, *gradients = reference(case, x)
    found = {}
    for name in (DENSE, CHUNKED):
        x.clear()
        found[name] = {"loss": abs(variants(case)[name](case, x) / exact - 1)}
        for part, true in zip(("hidden", "weight"), gradients, strict=True):
            got = cast(Tensor, getattr(x.student, part).grad).double()
            found[name][part] = ((got - true).norm() / true.norm()).item()
    return found


def peak_here(case: Case, name: str) -> int:
    """Bytes that one run of a variant adds at its peak, beyond weights and gradients; for a fresh process."""
    run, x = variants(case)[name], make_inputs(case, 0)
    run(case.shortened(), make_inputs(case.shortened(), 0))  # libraries' own buffers
    gradients = (x.student.hidden.numel() + x.student.weight.numel()) * x.student.weight.element_size()
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, x)
        return torch.cuda.max_memory_allocated() - before - gradients
    before = _resident_peak(reset=True)
    run(case, x)
    return _resident_peak() - before - gradients


def _resident_peak(reset: bool = False) -> int:
    """Peak resident bytes since the last reset where the system has one (Linux), else of the process."""
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # what is freed already would hide part of the rise
            Path("/proc/self/clear_refs").write_text("5")
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, AttributeError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak(case: Case, name: str) -> int:
    command = [sys.executable, __file__, "--peak", json.dumps({"case": asdict(case), "name": name})]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(case: Case, seeds: list[int], rounds: int) -> dict[str, Any]:
    todo = variants(case)
    runs: dict[str, list[float]] = {name: [] for name in todo}
    for run in todo.values():
        run(case.shortened(), make_inputs(case.shortened(), 0))
    for seed in seeds:
        x = make_inputs(case, seed)
        for _ in range(rounds):
            for name, run in todo.items():
                runs[name].append(seconds(case, run, x))
    peaks = {name: peak(case, name) for name in runs if name != PRODUCTS}
    return {
        "case": asdict(case),
        "rounds": rounds,
        "seeds": seeds,
        "runs": runs,
        "peaks": peaks,
        "errors": errors(case, x),
    }


def table(row: dict[str, Any]) -> Iterator[str]:
    runs, peaks, case = row["runs"], row["peaks"], Case(**row["case"])

    def ratio(name: str, base: str) -> float:
        return float(statistics.median(a / b for a, b in zip(runs[name], runs[base], strict=True)))

    size = f"N {case.tokens}, H {case.hidden}, V {case.vocabulary}, chunk {case.chunk or 'default'}"
    how = f"{case.dtype}, {case.device}, {case.threads} threads, {case.clock} clock"
    repeats = f"{row['rounds']} rounds x seeds {row['seeds']}"
    yield f"\n**{case.divergence}**, {size} (Liger {case.liger_chunk}), {how}, {repeats}\n"
    yield "| variant | min s | median s | spread | x dense | x products | peak MiB | x dense |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, times in runs.items():
        middle = statistics.median(times)
        times_text = f"{min(times):.3f} | {middle:.3f} | {(max(times) - min(times)) / middle:.0%}"
        memory = f"{peaks[name] / 2**20:.0f} | {peaks[name] / peaks[DENSE]:.2f}" if name in peaks else "- | -"
        yield f"| {name} | {times_text} | {ratio(name, DENSE):.2f} | {ratio(name, PRODUCTS):.2f} | {memory} |"
    yield "\nRelative distance from float64 (loss, gradient at hidden states, at weight):"
    for name, found in row["errors"].items():
        yield f"- {name}: " + ", ".join(f"{value:.1e}" for value in found.values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--divergences", default="js,forward_kl", help=f"of {', '.join(DIVERGENCES)}, or all")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--chunk", type=int, help="tokens per chunk; default: chosen by the function")
    parser.add_argument("--liger-chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.peak:
        job = json.loads(options.peak)
        case = Case(**job["case"])
        torch.set_num_threads(case.threads)
        print(peak_here(case, job["name"]))
        return
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {device}")
    for peer, module in (("Liger", "liger_kernel.chunked_loss"), ("TRL", "trl.kernels.chunked_divergence")):
        if not _importable(module):
            print(f"{peer} is not installed: left out")
    rows = []
    for name in list(DIVERGENCES) if options.divergences == "all" else options.divergences.split(","):
        given = vars(options)
        case = Case(
            divergence=name, **{f.name: given[f.name] for f in fields(Case) if f.name != "divergence"}
        )
        rows.append(measure(case, [int(s) for s in options.seeds.split(",")], options.rounds))
        print("\n".join(table(rows[-1])), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "device": device, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
