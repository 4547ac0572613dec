"""The step's overhead: kdcore against a bare torch loop and mmengine's Runner doing the same mathematics.

One process, one thread, blocks of steps in turns (so load hits all alike), CPU seconds a step, guards on.
Prints the median over blocks with quartiles and the ratio to the bare loop of the same run. ``--peers`` puts other
frameworks into the same turns (tools/peers.py says which, and how to install them).

    python tools/bench_step.py [--blocks 15] [--steps 20] [--peers] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F

from kdcore import engine
from kdcore.data import Source
from kdcore.datasets import TensorSet
from kdcore.recipe import parse
from kdcore.stages import StageRun
from kdcore.types import Batch, Data
from kdcore.zoo import conv_net

SIZES = {
    "about 20 ms": {"student": 28, "teacher": 48, "batch": 48},
    "about 2 ms": {"student": 4, "teacher": 8, "batch": 16},
}
TEMPERATURE = 4.0
SGD = {"use": "SGD", "lr": 0.01, "momentum": 0.9}


def images(*, count: int = 512) -> Data:
    """Random images 1x16x16: the step's cost does not depend on what they show."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(count, 1, 16, 16, generator=rng)
    target = torch.randint(0, 10, (count,), generator=rng)
    made = TensorSet(torch.arange(count), input=values, target=target)
    return Data(made, made, made, classes=10)


def objective(student: Any, teacher: Any, batch: Any) -> torch.Tensor:
    """What all three compute: cross-entropy plus T^2 KL."""
    logits = student(batch["input"])
    with torch.no_grad():
        said = teacher(batch["input"])
    log_q, log_p = F.log_softmax(logits / TEMPERATURE, -1), F.log_softmax(said / TEMPERATURE, -1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return F.cross_entropy(logits, batch["target"]) + kl


def models(size: dict[str, int]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return conv_net(width=size["student"]).train(), conv_net(width=size["teacher"]).eval().requires_grad_(
        False
    )


def bare(size: dict[str, int]) -> Callable[[Batch], Any]:
    student, teacher = models(size)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)

    def step(batch: Batch) -> None:
        loss = objective(student, teacher, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def runner_of(size: dict[str, int], folder: Path) -> Callable[[Batch], Any]:
    """mmengine's own Runner with its default hooks, its checkpoint hook aside."""
    from mmengine.model import BaseModel  # noqa: TID251 - the baseline is mmengine itself
    from mmengine.runner import Runner  # noqa: TID251

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = models(size)

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.teacher.eval()
            return self

        def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
            batch.pop("mode")
            return {"loss": objective(self.student, self.teacher, batch)}

    runner = Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=Source(parse(recipe(size)).data, 0).train_loader(range(8)),  # type: ignore[arg-type]
        train_cfg={"by_epoch": True, "max_epochs": 1000},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        default_hooks={"checkpoint": None, "logger": None, "sampler_seed": None},
        log_level="ERROR",
        experiment_name="bare-mmengine",
    )
    return _iterating(runner)


def recipe(size: dict[str, int]) -> dict[str, Any]:
    return {
        "data": {"source": "bench_step:images", "batch_size": size["batch"]},
        "teacher": {
            "main": {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"width": size["teacher"]}}
        },
        "student": {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"width": size["student"]}},
        "loss": [{"use": "kd", "temperature": TEMPERATURE}],
        "train": {"epochs": 1000, "schedule": {"use": "constant"}, "optimizer": SGD},
    }


def ours(size: dict[str, int], folder: Path) -> Callable[[Batch], Any]:
    from kdcore import building as build

    checked = parse(recipe(size))
    stage = StageRun(checked, "bench", folder)
    parts = build.assemble(checked, stage.source, stage.builder())
    distiller, _ = stage.context(parts)
    job = engine.Fit(distiller, checked.train, folder, dict)
    return _iterating(engine.make_runner(job))


def _iterating(runner: Any) -> Callable[[Batch], Any]:
    """One iteration at a time: prepare as ``train()`` does, with the loop held back."""
    loops: list[Any] = []
    build_loop = runner.build_train_loop

    def hold(config: Any) -> Any:
        loop = build_loop(config)
        loop.run = lambda: loops.append(loop)
        return loop

    runner.build_train_loop = hold
    runner.train()
    runner.call_hook("before_train")
    runner.call_hook("before_train_epoch")
    runner.model.train()
    loop = loops[0]
    return lambda batch: loop.run_iter(loop.iter, batch)


def measure(size: dict[str, int], blocks: int, steps: int, with_peers: bool) -> dict[str, list[float]]:
    rng = torch.Generator().manual_seed(1)
    shape = (size["batch"], 1, 16, 16)
    batches = [
        Batch(
            {
                "id": torch.arange(size["batch"]),
                "input": torch.randn(shape, generator=rng),
                "target": torch.randint(0, 10, shape[:1], generator=rng),
            }
        )
        for _ in range(steps)
    ]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        ways: dict[str, Callable[[Batch], Any]] = {
            "bare torch": bare(size),
            "mmengine Runner": runner_of(size, Path(one)),
            "kdcore": ours(size, Path(two)),
        }
        if with_peers:
            with torch.no_grad():
                student, teacher = models(size)
                expected = float(objective(student, teacher, batches[0]))
            ways |= peers.ways(lambda: models(size), TEMPERATURE, batches[0], expected)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for block in range(blocks + 1):
            for name, step in ways.items():
                began = time.process_time()
                for batch in batches:
                    step(batch)
                if block:  # the first warms up
                    times[name].append((time.process_time() - began) / steps * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peers", action="store_true", help="other frameworks that are installed, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread, {options.blocks} blocks"
    )
    for name, size in SIZES.items():
        times = measure(size, options.blocks, options.steps, options.peers)
        base = statistics.median(times["bare torch"])
        runner = statistics.median(times["mmengine Runner"])
        for way, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            row = {
                "step": name,
                "way": way,
                "ms": middle,
                "quartiles": [low, high],
                "ratio_to_bare": middle / base,
                "ms_above_runner": middle - runner,
            }
            rows.append(row)
            print(
                f"{name:12} {way:16} {middle:7.3f} ms [{low:.3f}, {high:.3f}]  {middle / base:6.3f} of bare"
                f"  {middle - runner:+.3f} ms against the Runner"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
