"""Routers in the step: which teacher runs on which samples, what weighs its terms, where gradient goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from kdcore import Batch, InputError, Loss, Outputs, Router, Student, Teacher
from kdcore.context import RunContext
from kdcore.data import Source
from kdcore.distill import Distiller
from kdcore.function_loss import FunctionLoss
from kdcore.losses import kd_loss
from kdcore.optimizers import trainable
from kdcore.parts import Parts, Slot
from kdcore.tables import DataTable, TaskTable
from kdcore.task import Task

SAMPLES, CLASSES, WIDTH = 5, 3, 4
NAMES = ("a", "b", "c")
Make = Callable[..., Distiller]
# sample -> teachers: a runs on 0, 2 and 3, b on 1 and 2, c on none; sample 4 has no teacher
PLAN = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)


class Linear(Student):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(logits=self.layer(batch["input"]))


class Fixed(Teacher):
    """Says what the batch holds under its name, and notes whom it was asked about."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.asked = name, list[list[int]]()

    def forward(self, batch: Batch) -> Outputs:
        self.asked.append(batch["id"].tolist())
        return Outputs(logits=batch[self.name])


class Table(Router):
    """Weights by sample id, as parameters; the plan is PLAN, or none."""

    def __init__(self, planned: bool = True, columns: int = 3) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(SAMPLES, columns, generator=torch.Generator().manual_seed(1)))
        self.planned, self.told = planned, list[dict[str, Any]]()
        self.labels_column = columns > len(NAMES)  # type: ignore[misc]

    def plan(self, batch: Batch, student: Outputs) -> Tensor | None:
        return PLAN[batch["id"]] if self.planned else None

    def forward(
        self, batch: Batch, student: Outputs, teachers: Mapping[str, Outputs]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.told.append({n: None if o.rows is None else o.rows.tolist() for n, o in teachers.items()})
        weights = self.weights[batch["id"]]
        return weights, {"balance": weights.sum(1)}


@pytest.fixture
def batch() -> Batch:
    made = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(SAMPLES, CLASSES, generator=made) for name in NAMES}
    inputs = torch.randn(SAMPLES, WIDTH, generator=made)
    return Batch({"id": torch.arange(SAMPLES), "input": inputs, "target": torch.arange(SAMPLES) % 3} | logits)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(router: Router, loss: Loss | None = None, **parts: Any) -> Distiller:
        torch.manual_seed(0)
        loss = loss or FunctionLoss(kd_loss, ("student_logits", "teacher_logits"), {"temperature": 2.0})
        teachers: dict[str, Teacher] = {name: Fixed(name) for name in NAMES}
        everything = Parts(Linear(), Task(TaskTable(), CLASSES), teachers, router, NAMES, **parts)
        everything.losses = [Slot("kd", loss, 0.5, NAMES)]
        everything.needs = {name: {"logits"} for name in NAMES}
        distiller = Distiller(everything)
        source = Source(DataTable(use="ids", count=8), 0)
        distiller.attach(RunContext(distiller, source, seed=0, folder=tmp_path, artefacts={}))
        return distiller

    return made


def kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> np.ndarray[Any, Any]:
    """T^2 KL(teacher || student) of each row, in float64 by numpy."""

    def log_softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    s = log_softmax(student.detach().double().numpy() / temperature)
    t = log_softmax(teacher.detach().double().numpy() / temperature)
    return temperature**2 * (np.exp(t) * (t - s)).sum(1)  # type: ignore[no-any-return]


def every_kl(distiller: Distiller, batch: Batch) -> np.ndarray[Any, Any]:
    """[B,K]: each teacher's KL on each sample."""
    student = distiller.student(batch).logits
    return np.stack([kl(student, batch[name]) for name in NAMES], axis=1)


def asked(distiller: Distiller, name: str) -> list[list[int]]:
    teacher = distiller.teachers[name]
    assert isinstance(teacher, Fixed)
    return teacher.asked


def wrapper(distiller: Distiller) -> OptimWrapper:
    return OptimWrapper(torch.optim.SGD(trainable(distiller.parts), lr=0.1))


def test_each_teacher_runs_on_its_rows_only(make: Make, batch: Batch) -> None:
    distiller = make(Table())
    distiller.terms(batch)
    assert [asked(distiller, name) for name in NAMES] == [[[0, 2, 3]], [[1, 2]], []]
    router = distiller.router
    assert isinstance(router, Table)
    assert router.told == [{"a": [0, 2, 3], "b": [1, 2]}]  # each answer says which rows it is for


def test_without_a_plan_all_run_on_all(make: Make, batch: Batch) -> None:
    distiller = make(Table(planned=False))
    terms = distiller.terms(batch)
    assert [asked(distiller, name) for name in NAMES] == [[[0, 1, 2, 3, 4]]] * 3
    weights = distiller.router.weights.detach().double().numpy()
    expected = (weights * every_kl(distiller, batch)).sum(1).mean()
    assert terms["kd"][1].item() == pytest.approx(expected, rel=1e-5)


def test_the_term_is_the_weighted_sum_over_all_samples_of_the_batch(make: Make, batch: Batch) -> None:
    distiller = make(Table())
    weight, value = distiller.terms(batch)["kd"]
    table = distiller.router.weights.detach().double().numpy() * PLAN.numpy()
    assert weight == 0.5
    # divided by the five samples, also where fewer had a teacher
    assert value.item() == pytest.approx((table * every_kl(distiller, batch)).sum() / SAMPLES, rel=1e-5)


def test_gradient_reaches_the_weights_where_a_teacher_ran(make: Make, batch: Batch) -> None:
    distiller = make(Table(), task_weight=0.0)
    value = distiller.terms(batch)["kd"][1]
    (grad,) = torch.autograd.grad(value, [distiller.router.weights])
    assert grad.numpy() == pytest.approx(every_kl(distiller, batch) * PLAN.numpy() / SAMPLES, rel=1e-4)


def test_the_runs_optimiser_trains_the_router(make: Make, batch: Batch) -> None:
    distiller = make(Table(), task_weight=0.0)
    before = distiller.router.weights.detach().clone()
    expected = before - 0.1 * torch.tensor(every_kl(distiller, batch) * PLAN.numpy() * 0.5 / SAMPLES + 0.2)
    distiller.train_step(batch, wrapper(distiller))  # the balance term, mean over samples, adds 1/5 a weight
    assert torch.allclose(distiller.router.weights.detach().double(), expected.double(), atol=1e-6)


def test_the_routers_own_terms_are_in_the_objective(make: Make, batch: Batch) -> None:
    distiller = make(Table())
    weight, value = distiller.terms(batch)["router.balance"]
    assert weight == 1.0
    assert value.item() == pytest.approx(distiller.router.weights.detach().sum(1).mean().item(), rel=1e-6)


def test_the_last_column_weighs_the_labels(make: Make, batch: Batch) -> None:
    distiller = make(Table(columns=4))
    logits = distiller.student(batch).logits.detach().double()
    each = -torch.log_softmax(logits, 1)[torch.arange(SAMPLES), batch["target"]]
    expected = (each * distiller.router.weights[:, 3].detach().double()).mean().item()
    assert distiller.terms(batch)["task"][1].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunks", [2, 5])
def test_accumulation_is_the_large_batch(make: Make, batch: Batch, chunks: int) -> None:
    whole, parts = make(Table()), make(Table())
    parts.accumulate = chunks
    logs = whole.train_step(batch, wrapper(whole)), parts.train_step(batch, wrapper(parts))
    assert torch.allclose(whole.student.layer.weight, parts.student.layer.weight, atol=1e-6)
    assert torch.allclose(whole.router.weights, parts.router.weights, atol=1e-6)
    assert {n: float(v) for n, v in logs[0].items()} == pytest.approx(
        {n: float(v) for n, v in logs[1].items()}
    )


class Watching(Loss):
    """Plain distillation that keeps what ``after_step`` told it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[int]] = {}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        assert len(student.logits) == len(teacher.logits) == len(batch)  # cut to the teacher's rows
        return kd_loss(student.logits, teacher.logits, temperature=2.0)

    def after_step(self, batch: Batch, student: Outputs, teachers: dict[str, Outputs]) -> None:
        self.rows = {name: o.rows.tolist() for name, o in teachers.items()}
        for name, outputs in teachers.items():
            assert torch.equal(outputs.logits, batch[name][outputs.rows])


@pytest.mark.parametrize("chunks", [1, 2])
def test_after_step_tells_the_rows_of_the_whole_batch(make: Make, batch: Batch, chunks: int) -> None:
    loss = Watching()
    distiller = make(Table(), loss)
    distiller.accumulate = chunks
    distiller.train_step(batch, wrapper(distiller))
    assert loss.rows == {"a": [0, 2, 3], "b": [1, 2]}  # c ran on nobody and is left out


def mean_kd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return kd_loss(student_logits, teacher_logits).mean()


def test_a_loss_of_one_value_a_batch_is_refused(make: Make, batch: Batch) -> None:
    distiller = make(Table(), FunctionLoss(mean_kd, ("student_logits", "teacher_logits"), {}))
    with pytest.raises(InputError, match=r"'kd' gives one value a batch: a router needs one value a sample"):
        distiller.terms(batch)


class TwoTerms(Loss):
    """Named terms, one of them [B,L]: both are weighed by sample."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"row": student.logits.sum(1), "grid": student.logits}


def test_named_and_positional_terms_are_weighed_by_sample(make: Make, batch: Batch) -> None:
    distiller = make(Table(), TwoTerms())
    terms = distiller.terms(batch)
    share = (distiller.router.weights.detach() * PLAN).sum(1)
    rows = distiller.student(batch).logits.detach()
    assert terms["kd.row"][1].item() == pytest.approx((share * rows.sum(1)).mean().item(), rel=1e-5)
    assert terms["kd.grid"][1].item() == pytest.approx((share * rows.mean(1)).mean().item(), rel=1e-5)


def test_a_term_that_trains_the_router_alone_is_not_called_dead(make: Make, batch: Batch) -> None:
    distiller = make(Table())
    distiller.train_step(batch, wrapper(distiller))
    reading = next(r for r in distiller.guards.readings if r.term == "router.balance")
    assert reading.gradient_norm == 0
    assert distiller.guards.warnings == []
