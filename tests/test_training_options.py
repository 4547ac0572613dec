"""Accumulation, clipping, precision, compile, schedules, several processes: options that must not change the sum."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import kdcore
from kdcore.checkpoint import load_tensors
from kdcore.errors import InputError
from kdcore.report import read_metrics

STUDENT = "stages/distill/student"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / STUDENT / "weights.safetensors", "test")


def distance(left: Path, right: Path) -> float:
    a, b = weights(left), weights(right)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture
def sgd(tiny: dict[str, Any]) -> dict[str, Any]:
    """SGD does not amplify rounding as Adam's division does, so equality can be asked for tightly."""
    tiny["train"]["optimizer"] = {"use": "SGD", "lr": 0.1, "momentum": 0.9}
    return tiny


def test_accumulation_is_the_large_batch(sgd: dict[str, Any], tmp_path: Path) -> None:
    whole = kdcore.run(sgd, out=tmp_path / "whole").folder
    parts = kdcore.run(sgd, overrides=["train.accumulate=4"], out=tmp_path / "parts").folder
    other = kdcore.run(sgd, overrides=["data.batch_size=8"], out=tmp_path / "other").folder
    assert distance(whole, parts) < 1e-6
    assert distance(whole, other) > 1e-3  # a test that could not fail would not see a real change of batch


def test_clipping_acts_on_the_accumulated_gradient(sgd: dict[str, Any], tmp_path: Path) -> None:
    sgd["train"]["clip"] = 0.05
    whole = kdcore.run(sgd, out=tmp_path / "whole").folder
    parts = kdcore.run(sgd, overrides=["train.accumulate=4"], out=tmp_path / "parts").folder
    free = kdcore.run(sgd, overrides=["train.clip=1e9"], out=tmp_path / "free").folder
    assert distance(whole, parts) < 1e-6
    assert distance(whole, free) > 1e-3


def test_bf16_stays_near_fp32(sgd: dict[str, Any], tmp_path: Path) -> None:
    full = kdcore.run(sgd, out=tmp_path / "full").folder
    half = kdcore.run(sgd, overrides=["train.precision=bf16"], out=tmp_path / "half").folder
    assert (
        0 < distance(full, half) < 2e-2
    )  # bf16 has 8 bits of mantissa: 4e-3 relative a product, over 8 steps
    assert all(value.dtype == torch.float32 for value in weights(half).values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do fp16")
def test_fp16_on_a_cpu_is_refused_in_words(sgd: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 training needs a GPU"):
        kdcore.run(sgd, overrides=["train.precision=fp16"], out=tmp_path / "run")


def test_compile_changes_no_result(sgd: dict[str, Any], tmp_path: Path) -> None:
    sgd["train"]["epochs"] = 1
    plain = kdcore.run(sgd, out=tmp_path / "plain").folder
    compiled = kdcore.run(sgd, overrides=["train.compile=true"], out=tmp_path / "compiled").folder
    assert distance(plain, compiled) < 1e-5


def test_steps_end_in_the_middle_of_an_epoch(tiny: dict[str, Any], tmp_path: Path) -> None:
    del tiny["train"]["epochs"]
    tiny["train"]["steps"] = 6  # 100 images in batches of 32: 4 steps an epoch
    run = kdcore.run(tiny, out=tmp_path / "run")
    assert run.results["student"]["steps"] == 6
    rows = read_metrics(run.folder / STUDENT / "metrics.jsonl")
    assert rows[-1]["step"] == 6
    assert any("val/accuracy" in row for row in rows)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"use": "constant"}, [0.1, 0.1, 0.1, 0.1]),
        # after step k the rate is lr * (1 - k/n), and lr * (1 + cos(pi k/n)) / 2
        ({"use": "linear"}, [0.075, 0.05, 0.025, 0.0]),
        ({"use": "cosine"}, [0.0853553, 0.05, 0.0146447, 0.0]),
        ({"use": "constant", "warmup": 0.5}, [0.0666667, 0.1, 0.1, 0.1]),
    ],
)
def test_learning_rate_schedules(
    sgd: dict[str, Any], tmp_path: Path, schedule: dict[str, Any], expected: list[float], monkeypatch: Any
) -> None:
    from kdcore import engine_hooks

    monkeypatch.setattr(engine_hooks, "LOG_STEPS", 1)
    sgd["train"] |= {"schedule": schedule, "epochs": 1}
    run = kdcore.run(sgd, out=tmp_path / "run")
    rows = [r for r in read_metrics(run.folder / STUDENT / "metrics.jsonl") if "lr" in r]
    assert [r["lr"] for r in rows] == pytest.approx(expected, abs=1e-6)


def test_same_seed_same_bits_and_another_seed_other_bits(tiny: dict[str, Any], tmp_path: Path) -> None:
    first = kdcore.run(tiny, out=tmp_path / "a").folder
    second = kdcore.run(tiny, out=tmp_path / "b").folder
    third = kdcore.run(tiny, seed=1, out=tmp_path / "c").folder
    assert distance(first, second) == 0.0
    assert distance(first, third) > 0.0


def test_an_unnamed_plugin_changes_nothing(
    tiny: dict[str, Any], tmp_path: Path, install: Callable[..., Any]
) -> None:
    """Installing a plugin must not change a run that does not name it."""
    before = kdcore.run(tiny, out=tmp_path / "before").folder
    install(
        "noisy",
        """
        import random
        from kdcore import Component, hookimpl
        random.random()
        @hookimpl
        def kd_losses():
            yield Component("noisy", "nowhere:nothing")
    """,
    )
    after = kdcore.run(tiny, out=tmp_path / "after").folder
    assert distance(before, after) == 0.0


TOKENS = """
    import torch
    from torch import nn
    from kdcore.types import Data, Outputs
    from kdcore.datasets import TensorSet

    def documents():
        '''Sequences of very different length, so that a mean of means would differ from the mean.'''
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 12, (40, 10), generator=rng)
        lengths = torch.randint(1, 11, (40,), generator=rng)
        target = torch.roll(tokens, -1, 1)
        target[torch.arange(10)[None, :] >= lengths[:, None]] = -100
        cuts = ((0, 24), (24, 32), (32, 40))
        sets = [TensorSet(torch.arange(a, b), input=tokens[a:b], target=target[a:b]) for a, b in cuts]
        return Data(*sets, classes=12)

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed, self.head = nn.Embedding(12, width), nn.Linear(width, 12)
        def forward(self, tokens):
            return self.head(torch.tanh(self.embed(tokens)))

    def net(*, width: int = 8):
        return Net(width)

    def spread(student_logits, *, scale: float = 1.0):
        '''Couples the batch: the variance of the batch's mean logits.'''
        return student_logits.var(0).sum() * scale
    spread.couples_batch = True
"""


def tokens_recipe(module: str) -> dict[str, Any]:
    return {
        "name": "tokens",
        "data": {"source": f"{module}:documents", "batch_size": 8},
        "teacher": {"main": {"use": "module", "model": f"{module}:net", "args": {"width": 16}}},
        "student": {"use": "module", "model": f"{module}:net"},
        "task": {"use": "language", "weight": 0.5},
        "loss": [{"use": "kd", "temperature": 2.0}],
        "train": {"epochs": 2, "optimizer": {"use": "SGD", "lr": 0.5}},
    }


def test_token_means_do_not_depend_on_how_the_batch_is_cut(
    write_module: Callable[..., str], tmp_path: Path
) -> None:
    recipe = tokens_recipe(write_module(TOKENS))
    whole = kdcore.run(recipe, out=tmp_path / "whole").folder
    parts = kdcore.run(recipe, overrides=["train.accumulate=3"], out=tmp_path / "parts").folder
    assert distance(whole, parts) < 1e-6


def torchrun(recipe: Path, out: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        "0",
    ]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "kdcore",
        "run",
        str(recipe),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(recipe.parent)}
    return subprocess.run(
        [*command, "--out", str(out), "--quiet"],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.parametrize("which", ["images", "tokens", "coupled"])
def test_two_processes_give_the_result_of_one(
    which: str,
    sgd: dict[str, Any],
    write_module: Callable[..., str],
    install: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Equal global batch, two gloo ranks, unequal shares (the last batch has 4 of 32 samples, tokens are ragged)."""
    module = write_module(TOKENS)
    recipe = copy.deepcopy(sgd) if which != "tokens" else tokens_recipe(module)
    if (
        which == "coupled"
    ):  # relations over the whole batch, and a memory bank that every rank must hold alike
        reads = {"student": {"embedding": "hidden0"}, "teacher": {"embedding": "hidden0"}}
        crd = {"use": "classics.crd", "negatives": 16, "dim": 8, "weight": 0.1, "reads": reads}
        recipe["loss"] += [{"use": "classics.rkd", "reads": reads}, crd]
        recipe["data"]["batch_size"] = 25
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe), "utf-8")
    one = kdcore.run(path, out=tmp_path / "one").folder
    done = torchrun(path, tmp_path / "two", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert distance(one, tmp_path / "two") < 2e-6


def test_accumulation_is_refused_where_the_loss_couples_the_batch(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    reads = {"student": {"embedding": "hidden0"}, "teacher": {"embedding": "hidden0"}}
    tiny["loss"] = [{"use": "classics.rkd", "reads": reads}]
    with pytest.raises(InputError, match="relates the samples of a batch"):
        kdcore.run(tiny, overrides=["train.accumulate=2"], out=tmp_path / "run")


def test_batch_norm_in_training_is_refused_with_several_processes(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["data"]["args"]["flat"] = False
    tiny["student"] = {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"width": 4}}
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny), "utf-8")
    tiny["teacher"]["main"] = {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"norm": "group"}}
    path.write_text(tomli_w.dumps(tiny), "utf-8")
    done = torchrun(path, tmp_path / "two", 2)
    assert done.returncode != 0
    assert "batch statistics" in done.stderr
    assert "group" in done.stderr  # the remedy


def test_a_student_of_distillation_alone_has_a_baseline(tiny: dict[str, Any], tmp_path: Path) -> None:
    """``task.weight = 0`` is the method's; the student alone has no other term than the task's."""
    tree = {**tiny, "task": {"weight": 0.0}, "report": {"baseline": True}}
    weighed = kdcore.run(tree, out=tmp_path / "weighed").results["test"]["baseline"]
    plain = kdcore.run({**tree, "task": {}}, out=tmp_path / "plain").results["test"]["baseline"]
    assert weighed == plain
