"""The teacher-signal cache: size against error, reading and writing, and a cached step beside a live one.

`codec`: bytes a token, and the error of the gradient of forward KL at the student's logits, relative L2 a token, median
and 95th percentile; beside DistillKit's two settings by its own formulas (arcee-ai/DistillKit@a61c2e7: its sizes, a
least-squares fit of the log-probabilities by rank, its default loss, which renormalises the top k). Teachers are Zipf
logits of a perplexity, in an order of their own a token; students are the teacher with noise of a standard deviation.
With `trained`, a small language model is trained on Python's documentation (needs kd-plugin-hf) and stands for the
teacher, a smaller one for the student.
`step`: in one process, in turns: the student's step alone, with a live teacher, with its full cache, with its top k.
`goal` is (teacher forward + student step) / (student step); `reached` the share of it that the cache gives. Written is
with the teacher's forward, read with checksums and decoding, in any order.

    python tools/bench_cache.py [codec] [trained] [step] [--tokens 48] [--rounds 9] [--steps 100] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdcore
from kdcore import api, building, functional
from kdcore import recipe as recipes
from kdcore.caching import TopKCodec
from kdcore.stages import StageRun

VOCABULARY = 128_256
Row = dict[str, Any]

# ---- size against error -----------------------------------------------------------------------------


def zipf(perplexity: float, tokens: int, draw: torch.Generator) -> Tensor:
    """[tokens, V] logits -s log(rank), with s by bisection, each token's ranks in another order."""
    low, high, ranks = 0.5, 8.0, torch.arange(1, VOCABULARY + 1, dtype=torch.float64).log()
    for _ in range(50):
        s = (low + high) / 2
        logp = (-s * ranks).log_softmax(0)
        low, high = (s, high) if float((logp.exp() * -logp).sum().exp()) > perplexity else (low, s)
    logits = (-s * ranks).float()
    return torch.stack([logits[torch.randperm(VOCABULARY, generator=draw)] for _ in range(tokens)])


def ours(teacher: Tensor, student: Tensor, codec: TopKCodec) -> tuple[float, Tensor]:
    """Bytes a token, and the gradient at the student's logits."""
    data, sizes = codec.encode(teacher)
    z = student.clone().requires_grad_()
    value = functional.forward_kl(*functional.topk_rows(z, codec.decode(data, sizes)))
    return len(data) / len(teacher), torch.autograd.grad(value.sum(), z)[0]


def exact_topk(teacher: Tensor, student: Tensor, k: int) -> tuple[float, Tensor]:
    """int32 ids and float16 values, renormalised: what is written most often."""
    top = teacher.log_softmax(-1).topk(k, -1)
    p = torch.zeros_like(student).scatter(-1, top.indices, top.values.half().float().softmax(-1))
    return 6.0 * k, student.softmax(-1) - p


def distillkit(
    teacher: Tensor, student: Tensor, k: int, exact: int, terms: list[int | str]
) -> tuple[float, Tensor]:
    """bfloat16 for the first, a polynomial in the rank for the others; the default loss takes the tail as 0."""
    top = teacher.log_softmax(-1).topk(k, -1)
    rank = torch.arange(k - exact, dtype=torch.float64)
    basis = torch.stack([rank.sqrt() if t == "sqrt" else rank ** float(t) for t in terms], -1)
    fit = torch.linalg.lstsq(basis, top.values[:, exact:].double().T).solution
    curve = (basis.float() @ fit.float()).T
    logp = torch.cat([top.values[:, :exact].bfloat16().float(), curve], -1)
    p = torch.zeros_like(student).scatter(-1, top.indices, logp.softmax(-1))
    bits = math.ceil(math.log2(teacher.shape[-1]))
    return exact * 2 + len(terms) * 4 + -(-k * bits // 8), student.softmax(-1) - p


def settings(classes: int) -> Iterator[tuple[str, Callable[[Tensor, Tensor], tuple[float, Tensor]]]]:
    for k in (16, 32, 48, 56, 64, 96, 128):
        yield f"kdcore top {k}", partial(ours, codec=TopKCodec(classes, k))
    for mass in (0.9, 0.98):
        yield f"kdcore top 128, mass {mass}", partial(ours, codec=TopKCodec(classes, 128, mass))
    yield "int32 + float16, top 32, renormalised", lambda t, s: exact_topk(t, s, 32)
    yield "DistillKit budget", lambda t, s: distillkit(t, s, 50, 1, [0, 1, "sqrt"])
    yield "DistillKit recommended", lambda t, s: distillkit(t, s, 128, 16, [0, 1, 2, 3, 4, "sqrt"])


def errors(what: str, teacher: Tensor, student: Tensor) -> Iterator[Row]:
    exact = student.softmax(-1) - teacher.softmax(-1)
    for name, way in settings(teacher.shape[-1]):
        size, gradient = way(teacher, student)
        error = (gradient - exact).norm(dim=-1) / exact.norm(dim=-1)
        middle, high = (100 * float(error.quantile(q)) for q in (0.5, 0.95))
        yield {"teacher": what, "codec": name, "bytes": size, "error % median": middle, "error % p95": high}


def codec_rows(tokens: int) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(0)
    for perplexity in (2, 10, 50):
        teacher = zipf(perplexity, tokens, draw)
        for noise in (0.5, 1.0):
            student = teacher + noise * torch.randn(teacher.shape, generator=draw)
            yield from errors(f"Zipf, perplexity {perplexity}, noise {noise}", teacher, student)


# ---- a trained pair, and the steps -------------------------------------------------------------------

LLAMA = {"model_type": "llama", "max_position_embeddings": 128, "tie_word_embeddings": True}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def recipe(vocab: int) -> dict[str, Any]:
    """A small language model learns Python's documentation from a larger one."""
    big = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    small = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1}
    return {
        "name": "bench",
        "data": {"source": "kd_plugin_hf.data:text", "args": {"vocab": vocab, "block": 128}, "batch_size": 8},
        "teacher": {"main": {"use": "hf", "config": {**LLAMA, **big, "vocab_size": vocab}}},
        "student": {"use": "hf", "config": {**LLAMA, **small, "vocab_size": vocab}},
        "task": {"use": "language", "metrics": ["loss"]},
        "loss": [{"use": "kd", "temperature": 1.0}],
        "train": {"steps": 50, "optimizer": {"use": "AdamW", "lr": 3e-3}},
    }


def prepared(tree: dict[str, Any], folder: Path) -> Any:
    """A distiller as a run has it before its first step, and its context."""
    source = recipes.read(tree)
    run = StageRun(recipes.check(source), "bench", folder)
    return run.context(building.assemble(run.recipe, run.source, run.builder()))


def trained_rows(folder: Path, steps: int) -> Iterator[Row]:
    tree = recipe(2048)
    tree["teacher"]["main"]["train"] = {"steps": steps}
    run = api.run(tree, out=folder / "trained").folder
    distiller, context = prepared({**tree, "name": "again"}, folder)
    for name, owner in (("teacher-main", distiller.teachers["main"]), ("student", distiller.student)):
        from kdcore.checkpoint import load_tensors

        owner.load_state_dict(load_tensors(next(run.glob(f"stages/*/{name}/weights.safetensors")), name))
    batch = next(iter(context.data("val"))).rows(torch.arange(4))
    distiller.eval()
    with torch.no_grad():
        said = [distiller.ask(name, batch) for name in ("main", "student")]
    teacher, student = (each.logits[said[0].mask].float() for each in said)
    logp = teacher.log_softmax(-1)
    perplexity = float((logp.exp() * -logp).sum(-1).mean().exp())
    yield from errors(f"trained Llama, V = 2,048, perplexity {perplexity:.0f}", teacher, student)


def step_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """One step of each way in turn: forward, teacher or cache, loss, backward (no optimiser)."""
    tree = recipe(8192)
    ways = {"student alone": {**tree, "loss": []}, "live teacher": tree}
    files: dict[str, Row] = {}
    for name, codec in (("cached in full", "full"), ("cached, top 56", "topk")):
        began = time.perf_counter()
        cache = kdcore.cache(tree, out=folder / name, codec=codec)
        seconds = time.perf_counter() - began
        tokens = int(sum(shard.columns["mask"].sum() for shard in cache.shards))
        size = sum(path.stat().st_size for path in cache.folder.glob("shard-*"))
        began = time.perf_counter()
        for part in torch.randperm(len(cache)).split(8):
            cache.decoded(part)
        read = time.perf_counter() - began
        files[name] = {"bytes a token": size / tokens, "tokens/s written": tokens / seconds}
        files[name]["tokens/s read"] = tokens / read
        changed = copy.deepcopy(tree)
        changed["teacher"]["main"] = {"use": "cached", "path": str(cache.folder)}
        ways[name] = changed
    made = {name: prepared(each, folder) for name, each in ways.items()}
    steps: dict[str, list[float]] = {name: [] for name in made}
    forwards: list[float] = []
    for index in range(rounds):
        for name, (distiller, context) in made.items():
            distiller.train()
            batch = context.stream("main")
            began = time.perf_counter()
            distiller(batch).backward()
            steps[name].append(time.perf_counter() - began)
            if name == "live teacher":
                began = time.perf_counter()
                with torch.no_grad():
                    distiller.ask("main", batch)
                forwards.append(time.perf_counter() - began)
        if not index:  # the first round warms up
            steps, forwards = {name: [] for name in made}, []
    middle = {name: statistics.median(times) for name, times in steps.items()}
    live, forward = middle["live teacher"], statistics.median(forwards)
    student_step = live - forward
    goal = live / student_step
    for name, seconds in middle.items():
        row: Row = {"way": name, "ms a step": 1000 * seconds, "live / this": live / seconds}
        if name in files:
            row |= {"goal": goal, "reached": live / seconds / goal, **files[name]}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=["codec", "trained", "step"], default=["codec", "trained", "step"]
    )
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="that the teacher of `trained` is trained for")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        work: dict[str, Callable[[], Iterator[Row]]] = {
            "codec": lambda: codec_rows(options.tokens),
            "trained": lambda: trained_rows(Path(scratch), options.steps),
            "step": lambda: step_rows(Path(scratch), options.rounds),
        }
        for part in options.parts:
            for row in work[part]():
                rows.append(row)
                print(
                    "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()),
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2), "utf-8")


if __name__ == "__main__":
    main()
