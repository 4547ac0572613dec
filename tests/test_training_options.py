"""Accumulation, clipping, precision, compile, schedules, several processes: options that must not change the sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kdcore.building import Builder, assemble, make_student
from kdcore.checkpoint import load_tensors
from kdcore.data import Source
from kdcore.errors import InputError
from kdcore.recipe import parse
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


def test_fp16_on_a_cpu_is_refused_in_words(sgd: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 training needs a GPU"):
        kdcore.run(sgd, overrides=["train.precision=fp16", "train.device=cpu"], out=tmp_path / "run")


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
    run = kdcore.run(tiny, out=tmp_path / "a")
    assert run.results["conventions"][0]["component"] == "FunctionLoss(kd_loss, temperature=4.0)"
    first, second = run.folder, kdcore.run(tiny, out=tmp_path / "b").folder
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
        short = target.clone()
        short[:, 3:] = -100
        cuts = ((0, 24), (24, 32), (32, 40))
        sets = [TensorSet(torch.arange(a, b), input=tokens[a:b], target=target[a:b], short=short[a:b])
                for a, b in cuts]
        return Data(*sets, classes=12)

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed, self.head = nn.Embedding(12, width), nn.Linear(width, 12)
        def forward(self, tokens):
            return self.head(torch.tanh(self.embed(tokens)))

    def net(*, width: int = 8):
        return Net(width)
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


def test_a_view_of_the_target_is_what_is_counted(write_module: Callable[..., str], tmp_path: Path) -> None:
    """The student sees another target: losses, counts and evaluation take that one, however the batch is cut."""
    recipe = tokens_recipe(write_module(TOKENS))
    recipe["student"]["view"] = {"target": "short"}
    whole = kdcore.run(recipe, out=tmp_path / "whole")
    parts = kdcore.run(recipe, overrides=["train.accumulate=3"], out=tmp_path / "parts")
    assert distance(whole.folder, parts.folder) < 1e-6
    assert whole.metrics == pytest.approx(parts.metrics, rel=1e-5)
    for run in (whole, parts):
        first = read_metrics(run.folder / STUDENT / "metrics.jsonl")[0]["task"]
        assert first == pytest.approx(first_task_loss(recipe), rel=1e-5)


def first_task_loss(recipe: dict[str, Any]) -> float:
    """The cross-entropy of the first batch over the positions of ``short``, by log_softmax in float64."""
    checked = parse(recipe)
    source, student = Source(checked.data, 0), make_student(checked, Builder(0))
    rows = torch.tensor([key.index for key in source.order().keys(0)])
    values = source.data.train.values
    with torch.no_grad():
        logp = student.model(values["input"][rows]).double().log_softmax(-1)
    short = values["short"][rows]
    return -float(logp.gather(-1, short.clamp(min=0)[..., None])[..., 0][short != -100].mean())


BALANCE = """
    from kdcore import Component, Router, hookimpl

    class Balance(Router):
        '''Even weights, and a term that couples the batch, or one that does not.'''
        def __init__(self, *, coupled: bool = True):
            super().__init__()
            self.coupled = coupled
        def forward(self, batch, student, teachers):
            weights = student["logits"].new_ones(len(batch), len(teachers))
            spread = student["logits"].square().mean(1)
            return weights, {"balance": spread.mean() ** 2 if self.coupled else spread}
"""
MERGING = """
    from kdcore import Loss

    class Merging(Loss):
        '''Adds up the terms' gradients itself.'''
        def forward(self, student, teacher, batch):
            return (student.logits - teacher.logits).square().sum(1)
        def merge(self, gradients):
            return [sum(g for g in each if g is not None) for each in zip(*gradients.values())]
"""


def installed(install: Callable[..., Any], write_module: Callable[..., str], kind: str, code: str) -> str:
    """The one class in ``code`` as the component ``made``."""
    module, name = write_module(code), code.partition("class ")[2].partition("(")[0]
    declared = f"""
        from kdcore import Component, hookimpl
        @hookimpl
        def kd_{kind}():
            yield Component("made", "{module}:{name}")
    """
    install("made", declared)
    return "made"


def test_a_routers_batch_wise_term_refuses_accumulation(
    sgd: dict[str, Any], install: Callable[..., Any], write_module: Callable[..., str], tmp_path: Path
) -> None:
    """Over micro-batches the square of a mean is not what it is over the batch; a mean of samples is."""
    sgd["router"] = {"use": installed(install, write_module, "routers", BALANCE)}
    kdcore.run(sgd, out=tmp_path / "alone")
    with pytest.raises(InputError, match="'balance' is one value a batch"):
        kdcore.run(sgd, overrides=["train.accumulate=2"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sgd["router"]["coupled"] = False
    whole = kdcore.run(sgd, out=tmp_path / "whole").folder
    parts = kdcore.run(sgd, overrides=["train.accumulate=2"], out=tmp_path / "parts").folder
    assert distance(whole, parts) < 1e-6


def test_fp16_is_refused_where_a_component_merges_gradients(
    tiny: dict[str, Any], install: Callable[..., Any], write_module: Callable[..., str]
) -> None:
    """fp16 scales the loss; what merges gradients would see them scaled. (Running fp16 takes a GPU.)"""
    tiny["loss"].append({"use": installed(install, write_module, "losses", MERGING)})

    def assembled(precision: str) -> Any:
        recipe = parse({**tiny, "train": {**tiny["train"], "precision": precision}})
        return assemble(recipe, Source(recipe.data, 0), Builder(0))

    assert [slot.name for slot in assembled("bf16").losses] == ["kd", "made"]
    with pytest.raises(InputError, match=r"loss\.made merges gradients that are not scaled") as caught:
        assembled("fp16")
    assert caught.value.place == "train.precision"
    del tiny["loss"][1]
    assert len(assembled("fp16").losses) == 1


def test_accumulation_is_refused_where_the_loss_couples_the_batch(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    reads = {"student": {"embedding": "hidden0"}, "teacher": {"embedding": "hidden0"}}
    tiny["loss"] = [{"use": "classics.rkd", "reads": reads}]
    with pytest.raises(InputError, match="relates the samples of a batch"):
        kdcore.run(tiny, overrides=["train.accumulate=2"], out=tmp_path / "run")
