"""What a report says of data, models, method and budget, and of a model that learned nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdcore
from kdcore import summary
from kdcore.plugins import Entry
from kdcore.recipe import parse


def settings(tree: dict[str, Any], results: dict[str, Any] | None = None) -> dict[str, str]:
    return {
        row["part"]: f"{row['is']}: {row['settings']}" for row in summary.rows(parse(tree), results or {})
    }


def test_every_part_with_the_parameters_that_it_had(rich: tuple[dict[str, Any], Any]) -> None:
    found = settings(rich[0])
    assert found["data"] == "kdcore.datasets:digits: val 0.15; test 0.35; split seed 0; labels 100; flat yes"
    assert (
        found["teacher.main"]
        == "module: inputs input; model kdcore.zoo:mlp(inputs 64; hidden 16; classes 10)"
    )
    assert found["teacher.ema"] == "self: weights ema; decay 0.9"
    assert found["augmentation.0"] == "bank.noise: size 64"
    assert found["loss.0"] == "kd: weight start 0.1, end 1; teacher main; temperature 4"
    assert found["loss.2"] == "bank: weight 0.1; momentum 0.9"
    assert found["task"] == "classification: metrics accuracy; weight 1"
    assert found["training of teacher main"].startswith(
        "AdamW: epochs 1; batch size 32; lr 0.002; betas 0.9, 0.999;"
    )
    assert found["training of the student"].endswith("; schedule cosine; warmup 0.2; clip 1; keep best")


def test_arguments_that_an_earlier_stage_leaves_are_named(rich: tuple[dict[str, Any], Any]) -> None:
    tree = {**rich[0], "student": {"use": "module", "model": "kdcore.zoo:mlp", "args": "@search.args"}}
    assert (
        settings(tree)["student"]
        == "module: inputs input; export batch 1, 64; model kdcore.zoo:mlp; args @search.args"
    )


ROUTED = """
    from kdcore import Component, hookimpl

    @hookimpl
    def kd_routers():
        yield Component("mean", "{0}:Mean")
    @hookimpl
    def kd_losses():
        yield Component("mean", "{0}:Outer")
"""
PARTS = """
    from kdcore.kinds import Loss, Router

    class Mean(Router):
        def __init__(self, *, sharpness: float = 2.0, window: int | None = None, hard: bool = False):
            super().__init__()

        def forward(self, batch, student, teachers):
            return None

    class Outer(Loss):
        def __init__(self, *, inner: Loss, scale: float = 3.0):
            super().__init__()

        def forward(self, student, teacher, batch):
            return None
"""


def test_routers_and_nested_components(
    tiny: dict[str, Any], install: Callable[..., Entry], write_module: Callable[..., str]
) -> None:
    install("mean", ROUTED.format(write_module(PARTS)))
    tiny["router"] = {"use": "mean", "hard": True}
    tiny["loss"] = [{"use": "mean", "inner": {"use": "kd"}}]
    tiny["stage"] = [{"use": "distill", "name": "first", "loss": [{"use": "kd", "temperature": 2.0}]}]
    found = settings(tiny, {"data": {"description": "some", "samples": {"train": 3, "test": 2}}})
    assert found["router"] == "mean: sharpness 2; hard yes"
    assert found["loss.0"] == "mean: scale 3; inner kd (temperature 4)"
    assert found["stage.0.loss.0"] == "kd: temperature 2"
    assert found["samples"] == "some: train 3; test 2"


SKEWED = """
    import torch
    from kdcore import Data
    from kdcore.datasets import TensorSet
    from kdcore.zoo import mlp

    def skewed():
        target = (torch.arange(32) % 4 == 0).long()
        rows = TensorSet(torch.arange(32), input=torch.zeros(32, 4), target=target)
        return Data(rows, rows, rows, classes=2)

    def blind():
        return torch.nn.Linear(4, 2)
"""


def test_a_model_that_names_the_majority_class_alone_is_warned_of(
    tmp_path: Path, write_module: Callable[..., str]
) -> None:
    module = write_module(SKEWED)
    tree = {
        "name": "skewed",
        "data": {"source": f"{module}:skewed"},
        "student": {"use": "module", "model": f"{module}:blind"},
        "train": {"steps": 3, "optimizer": {"use": "SGD", "lr": 0.5}},
    }
    run = kdcore.run(tree, out=tmp_path / "run")
    assert run.results["data"] == {
        "description": "",
        "samples": {"train": 32, "val": 32, "test": 32},
        "majority": 0.75,
    }
    assert run.metrics["accuracy"] == pytest.approx(0.75)
    warning = "on the test split no better than naming its most frequent class always (accuracy 0.75)"
    assert f"student, distilled: {warning}" in (run.folder / "report.md").read_text("utf-8")
    markdown = kdcore.compare(tree, seeds=2, out=tmp_path / "c").markdown
    assert f"none, seed 0, 1: {warning}" in markdown
    assert "differences of less are not asked for" in markdown
    assert warning not in (kdcore.run("pld:digits", out=tmp_path / "good").folder / "report.md").read_text(
        "utf-8"
    )
