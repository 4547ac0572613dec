"""Evaluation: the task's own loss as a metric, and models judged behind their views."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

import kdcore
from kdcore import Batch, InputError, Outputs, Student
from kdcore.counts import Counts
from kdcore.report import read_metrics
from kdcore.shipping import load_student, request_of
from kdcore.tables import TaskTable
from kdcore.task import Task, higher_is_better, is_share, judge

SIZES = (3, 5)


def batches() -> list[Batch]:
    made = torch.Generator().manual_seed(0)
    return [
        Batch({"id": torch.arange(n), "z": torch.randn(n, 4, generator=made), "target": torch.arange(n) % 4})
        for n in SIZES
    ]


class Given(Student):
    """Answers with the batch's ``z``."""

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(logits=batch["z"])


class TwoTerms(Given):
    def task_loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"squares": batch["z"].square().sum(1), "ones": torch.ones(len(batch))}


def test_the_loss_is_a_metric_over_all_samples() -> None:
    task = Task(TaskTable(metrics=["loss", "accuracy"]), 4)
    found = judge(Given(), batches(), task, torch.device("cpu")).compute()
    z, target = (torch.cat([b[k] for b in batches()]) for k in ("z", "target"))
    assert list(found) == ["loss", "accuracy"]  # the first decides what is best
    assert found["loss"] == pytest.approx(F.cross_entropy(z, target).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((z.argmax(1) == target).float().mean().item())


def test_a_students_own_loss_is_the_one_that_counts() -> None:
    task = Task(TaskTable(use="none", metrics=["loss"]), None)
    found = judge(TwoTerms(), batches(), task, torch.device("cpu")).compute()
    z = torch.cat([b["z"] for b in batches()])
    assert found["loss"] == pytest.approx(z.square().sum(1).mean().item() + 1, rel=1e-5)


def test_the_best_is_the_lowest_loss(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["teacher"], tiny["loss"] = {}, []
    tiny["task"] = {"metrics": ["loss", "accuracy"]}
    tiny["train"] = {"epochs": 6, "keep": "best", "optimizer": {"use": "SGD", "lr": 3.0}}
    kdcore.run(tiny, out=tmp_path / "run")
    rows = read_metrics(tmp_path / "run/stages/distill/student/metrics.jsonl")
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert min(losses) < losses[-1]  # this rate does not converge, so keeping the last would be another model
    student, run = load_student(tmp_path / "run")
    request = request_of(tmp_path / "run")
    assert request.metric_name.startswith("accuracy on ")  # what a graph can be judged by without the model
    assert request.metric is not None
    assert 0 <= request.metric(request.rule, request.targets) <= 1
    kept = judge(student, run.source.loader("val"), Task(run.recipe.task, 10), torch.device("cpu")).compute()
    assert kept["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_val_is_judged_behind_the_view(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["teacher"], tiny["loss"] = {}, []
    plain = kdcore.run(tiny, out=tmp_path / "plain").results["student"]["metrics"]
    tiny["student"] |= {"inputs": ["pixels"], "view": {"pixels": "input"}}
    viewed = kdcore.run(tiny, out=tmp_path / "viewed").results["student"]["metrics"]
    assert viewed == plain


def test_shares_of_an_empty_count_are_means() -> None:
    batch = batches()[0]
    assert Counts().share(torch.tensor([1.0, 2.0, 6.0]), "main", None, batch).item() == 3.0


class Largest(Metric):
    """The largest prediction minus the largest target, whatever their shapes."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("gap", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.gap = torch.maximum(self.gap, prediction.max() - target.max())

    def compute(self) -> Tensor:
        return self.gap


def test_a_metric_by_its_import_string_judges_a_task_of_its_own(write_module: Any) -> None:
    name = write_module("from test_evaluation_metric import Largest", "a_module")
    sys.modules["test_evaluation_metric"] = sys.modules[__name__]
    metric = f"{name}:Largest"
    task = Task(TaskTable(use="own", metrics=[metric, "loss"]), None)
    found = judge(TwoTerms(), batches(), task, torch.device("cpu")).compute()
    assert found[metric] == pytest.approx(max(float(b["z"].max() - b["target"].max()) for b in batches()))
    assert task.terms(Outputs(logits=torch.zeros(2, 3)), Batch({"target": torch.tensor([0, 1])})) is None
    assert not higher_is_better(metric)


def test_metrics_between_0_and_1_are_shares() -> None:
    shares = ("accuracy", "hamming_distance", "exact_match", "calibration_error", "probe.tail.accuracy")
    assert all(map(is_share, shares))
    assert not any(
        map(is_share, ("loss", "hinge_loss", "mean_squared_error", "perplexity", "probe.size.total"))
    )


def test_a_metric_by_import_string_must_be_one() -> None:
    with pytest.raises(InputError, match=r"no torchmetrics\.Metric"):
        Task(TaskTable(use="own", metrics=["kdcore.zoo:mlp"]), None)
