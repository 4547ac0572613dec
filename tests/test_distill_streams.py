"""Streams in the step: joint and separate forwards, each stream's mean, what is asked, merged and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from kdcore import Augmentation, Batch, InputError, Loss, Outputs, Student, Teacher
from kdcore.context import RunContext
from kdcore.data import Order, Source
from kdcore.distill import Distiller
from kdcore.function_loss import FunctionLoss
from kdcore.losses import TaskLoss, kd_loss
from kdcore.parts import Parts, Slot
from kdcore.tables import DataTable, TaskTable
from kdcore.task import Task

CLASSES, WIDTH = 3, 4
Make = Callable[..., Distiller]


class Linear(Student):
    """One linear layer, with batch norm before it where asked."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(logits=self.layer(self.norm(batch["input"])))


class Fixed(Teacher):
    """Says what the batch holds under ``said``, and counts the samples that it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[int] = Counter()

    def forward(self, batch: Batch) -> Outputs:
        self.asked.update(batch["id"].tolist())
        return Outputs(logits=batch["said"])


def part(first: int, size: int, labels: bool = False) -> Batch:
    made = torch.Generator().manual_seed(first)
    values: dict[str, Any] = {
        "id": torch.arange(first, first + size),
        "input": torch.randn(size, WIDTH, generator=made),
        "said": torch.randn(size, CLASSES, generator=made),
    }
    return Batch(values | ({"target": torch.arange(size) % CLASSES} if labels else {}))


@pytest.fixture
def batch() -> Batch:
    """Two labelled samples and six unlabelled ones."""
    return Batch(parts={"labelled": part(0, 2, labels=True), "unlabelled": part(10, 6)})


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A distiller of a student, one teacher and slots, attached to a run, as ``build`` would make it."""

    def made(*slots: Slot, student: Student | None = None, norm: bool = False, **parts: Any) -> Distiller:
        torch.manual_seed(0)
        everything = Parts(student or Linear(norm), Task(TaskTable(), CLASSES), {"main": Fixed()}, **parts)
        everything.losses, everything.needs = list(slots), {"main": {"logits"}}
        distiller = Distiller(everything)
        source = Source(DataTable(use="ids", count=8), 0)
        distiller.attach(RunContext(distiller, source, seed=0, folder=tmp_path, artefacts={}))
        return distiller

    return made


def kd(streams: tuple[str, ...] | None = None, weight: float = 1.0, name: str = "kd") -> Slot:
    loss = FunctionLoss(kd_loss, ("student_logits", "teacher_logits"), {"temperature": 2.0})
    return Slot(name, loss, weight, ("main",), streams)


def kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> np.ndarray[Any, Any]:
    """T^2 KL(teacher || student) of each row, in float64 by numpy."""

    def log_softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    s = log_softmax(student.detach().double().numpy() / temperature)
    t = log_softmax(teacher.detach().double().numpy() / temperature)
    return temperature**2 * (np.exp(t) * (t - s)).sum(1)  # type: ignore[no-any-return]


def gradient(distiller: Distiller, batch: Batch) -> Tensor:
    distiller.zero_grad()
    distiller(batch).backward()
    weight = distiller.student.layer.weight
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    return weight.grad.clone()


@pytest.mark.parametrize("norm", [False, True])
def test_joint_and_separate_forwards_agree_without_batch_statistics_only(
    make: Make, batch: Batch, norm: bool
) -> None:
    joint, separate = make(kd(), norm=norm), make(kd(), norm=norm, forward="separate")
    same = torch.allclose(gradient(joint, batch), gradient(separate, batch), atol=1e-6)
    assert same is not norm


def test_each_stream_is_its_own_mean_and_the_means_are_added(make: Make, batch: Batch) -> None:
    distiller = make(kd())
    terms = distiller.terms(batch)
    means = []
    for stream in batch.parts.values():
        means.append(kl(distiller.student(stream).logits, stream["said"]).mean())
    assert terms["kd"][1].item() == pytest.approx(sum(means), rel=1e-5)


class Positions(Loss):
    """[B,L] with L = 3: 0, 1, 2 in every row."""

    couples_batch = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return student.logits * 0 + torch.arange(CLASSES)


class Rows(Loss):
    """One value a sample of all streams: how many samples there are in all."""

    couples_batch = all_streams = True

    def forward(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        assert [len(part) for part in batch.parts.values()] == [len(said.logits) for said in student.values()]
        return torch.cat([said.logits.sum(1) * 0 + len(batch) for said in student.values()])


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same samples, so that what is gathered is what one has, twice."""
    monkeypatch.setattr("kdcore.parallel.world", lambda: 2)
    monkeypatch.setattr("kdcore.parallel.gather", lambda value: torch.cat([value, value]))


@pytest.mark.usefixtures("two_processes")
def test_a_gathered_term_of_positions_is_the_mean_over_the_supervised_ones(make: Make) -> None:
    """A coupled loss sees the same gathered batch in every process; each adds its half of the masked mean."""
    whole = part(0, 4)
    whole["mask"] = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 1]])
    distiller = make(Slot("positions", Positions(), 1.0, ("main",), None))
    assert distiller.terms(whole)["positions"][1].item() == pytest.approx((0 + 2 + 2 + 1 + 2) / 5 / 2)


@pytest.mark.usefixtures("two_processes")
def test_a_coupled_loss_of_all_streams_sees_all_processes_samples(make: Make, batch: Batch) -> None:
    distiller = make(Slot("rows", Rows(), 1.0), task_weight=0.0)
    assert distiller.terms(batch)["rows"][1].item() == pytest.approx(16 / 2)


def test_a_slot_hears_only_its_streams_and_the_task_only_labels(make: Make, batch: Batch) -> None:
    distiller = make(kd(("unlabelled",)))
    terms = distiller.terms(batch)
    labelled, unlabelled = batch.parts["labelled"], batch.parts["unlabelled"]
    expected = kl(distiller.student(unlabelled).logits, unlabelled["said"]).mean()
    assert terms["kd"][1].item() == pytest.approx(expected, rel=1e-5)
    logits = distiller.student(labelled).logits.double()
    picked = -torch.log_softmax(logits, 1)[torch.arange(2), labelled["target"]].mean()
    assert terms["task"][1].item() == pytest.approx(picked.item(), rel=1e-5)
    assert distiller.teachers["main"].asked == Counter(unlabelled["id"].tolist())  # nobody reads the labelled


def test_the_task_loss_as_a_term_skips_streams_without_labels(make: Make, batch: Batch) -> None:
    distiller, plain = make(Slot("task", TaskLoss(), 0.5)), make()
    weight, value = distiller.terms(batch)["task"]
    assert weight == 0.5
    assert torch.equal(value, plain.terms(batch)["task"][1])


class Union(Loss):
    """One mean over the union of the streams."""

    all_streams = True

    def forward(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        said = teacher["main"]
        return torch.cat([kd_loss(student[s].logits, said[s].logits, temperature=2.0) for s in batch.streams])


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_loss_of_all_streams_is_a_mean_over_their_union(make: Make, batch: Batch, chunks: int) -> None:
    distiller = make(Slot("kd", Union(), 1.0, ("main",)), task_weight=0.0)
    rows = [kl(distiller.student(p).logits, p["said"]) for p in batch.parts.values()]
    distiller.accumulate = chunks
    logs = distiller.train_step(batch, wrapper(distiller))
    assert float(logs["kd"]) == pytest.approx(np.concatenate(rows).mean(), rel=1e-5)


def wrapper(distiller: Distiller) -> OptimWrapper:
    return OptimWrapper(torch.optim.SGD(distiller.student.parameters(), lr=0.1))


@pytest.mark.parametrize("chunks", [2, 4])
def test_accumulation_loses_no_sample_of_the_longer_stream(make: Make, batch: Batch, chunks: int) -> None:
    whole, parts = make(kd()), make(kd())
    parts.accumulate = chunks  # more than the labelled stream's two samples: two chunks then
    whole.train_step(batch, wrapper(whole))
    parts.train_step(batch, wrapper(parts))
    assert torch.allclose(whole.student.layer.weight, parts.student.layer.weight, atol=1e-6)
    assert parts.teachers["main"].asked == whole.teachers["main"].asked


class Halves(Loss):
    """Plain distillation, and a merger that takes half of the task's gradient and all of the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []
        self.rows: dict[str, list[int]] = {}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return kd_loss(student.logits, teacher.logits, temperature=2.0)

    def merge(self, grads: dict[str, list[Tensor | None]]) -> list[Tensor]:
        self.seen.append(sorted(grads))
        return [0.5 * task + other for task, other in zip(grads["task"], grads["kd"], strict=True)]

    def after_step(self, batch: Batch, student: dict[str, Outputs], teachers: dict[str, Any]) -> None:
        self.rows = {stream: list(o.logits.shape) for stream, o in student.items()}
        assert torch.equal(teachers["main"]["unlabelled"].logits, batch.parts["unlabelled"]["said"])


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_merger_gets_each_terms_gradient_of_the_whole_batch(make: Make, batch: Batch, chunks: int) -> None:
    merged = make(Slot("kd", Halves(), 1.0, ("main",)))
    halved = make(kd(), task_weight=0.5)  # the same by a weight
    merged.accumulate = chunks
    merged.train_step(batch, wrapper(merged))
    halved.train_step(batch, wrapper(halved))
    assert torch.allclose(merged.student.layer.weight, halved.student.layer.weight, atol=1e-6)
    loss = merged.parts.losses[0].loss
    assert isinstance(loss, Halves)
    assert loss.seen == [["kd", "task"]]
    assert loss.rows == {"labelled": [2, CLASSES], "unlabelled": [6, CLASSES]}  # chunks joined again


class Wrapper(Student):
    """A student that holds another one, which has an event and an optimiser of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, batch: Batch) -> Outputs:
        out: Outputs = self.inner(batch)
        return out


class Inner(Linear):
    steps = 0

    def after_step(self) -> None:
        Inner.steps += 1


def test_a_nested_component_gets_its_run_and_its_events(make: Make, batch: Batch) -> None:
    distiller = make(student=Wrapper())
    Inner.steps = 0
    distiller.train_step(batch, wrapper(distiller))
    inner = distiller.student.inner
    assert isinstance(inner, Inner)
    assert Inner.steps == 1
    assert inner.run is distiller.run
    assert distiller.name_of(inner) == "student.inner"


class Masked(Augmentation):
    """Takes the inputs away, in place of which its event sees both batches."""

    def forward(self, batch: Batch) -> Batch:
        batch["input"] = torch.zeros_like(batch["input"])
        return batch

    def before_step(self, batch: Batch, clean: Batch) -> None:
        self.seen = batch["input"], clean["input"]


def test_before_step_offers_the_batch_before_augmentation_too(make: Make) -> None:
    augmentation, data = Masked(), part(0, 4, labels=True)
    distiller = make(kd(), augmentations={"masked": augmentation})
    distiller.train_step(data, wrapper(distiller))
    augmented, clean = augmentation.seen
    assert not augmented.any()
    assert torch.equal(clean, data["input"])


def test_the_named_stream_ends_the_epoch_and_the_other_cycles() -> None:
    order = Order({"labelled": 5, "unlabelled": 12}, {"labelled": 4, "unlabelled": 5}, "unlabelled", seed=0)
    assert order.steps_per_epoch == 3  # 12 samples in fives
    keys = [order.keys(step) for step in range(5)]
    sizes = [Counter(k.stream for k in each) for each in keys]
    assert [(s["labelled"], s["unlabelled"]) for s in sizes] == [(4, 5), (4, 5), (4, 2), (4, 5), (4, 5)]
    labelled = [k for each in keys for k in each if k.stream == "labelled"]
    cycles = [labelled[start : start + 5] for start in range(0, 20, 5)]
    assert [[k.cycle for k in cycle] for cycle in cycles] == [[c] * 5 for c in range(4)]
    assert all(sorted(k.index for k in cycle) == [0, 1, 2, 3, 4] for cycle in cycles)  # each once a cycle
    epoch = [k.index for each in keys[:3] for k in each if k.stream == "unlabelled"]
    assert sorted(epoch) == list(range(12))


def test_a_batch_without_streams_answers_to_any_name(make: Make, batch: Batch) -> None:
    named, plain = make(kd(("labelled",)), task_streams=("labelled",)), make(kd())
    part = batch.part("labelled")  # what a teacher of the same recipe trains on
    ours, theirs = named.terms(part), plain.terms(part)
    assert {n: v.item() for n, (_, v) in ours.items()} == {n: v.item() for n, (_, v) in theirs.items()}


def test_an_unknown_stream_is_named(make: Make, batch: Batch) -> None:
    with pytest.raises(Exception, match=r"no stream 'others'; it has \['labelled', 'unlabelled'\]"):
        make(kd(("others",))).terms(batch)
    with pytest.raises(InputError, match="no stream of this name"):
        Source(DataTable(use="ids", count=8, epoch="others"), 0)
