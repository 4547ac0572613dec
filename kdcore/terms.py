"""The terms of a pass: everybody is asked about a batch, and losses and task make terms of the answers.

student -> plan -> teachers -> weights -> losses -> task loss. Every term is a sum over the global batch divided by
its global count, so micro-batches and ranks do not change the objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from kdcore import parallel, streams
from kdcore.counts import ALL, Counts, weighed
from kdcore.errors import InputError
from kdcore.kinds import Terms
from kdcore.parts import Parts, Slot
from kdcore.streams import Streams
from kdcore.taps import Replace
from kdcore.types import FIELDS, Batch, Outputs

if TYPE_CHECKING:
    from kdcore.context import RunContext


@dataclass(eq=False)
class Heard:
    """What everybody says of one stream of a batch; a routed teacher answers for its ``rows`` only."""

    stream: str
    batch: Batch
    student: Outputs
    teachers: dict[str, Outputs] = field(default_factory=dict)
    weights: Tensor | None = None  # [B,K], the router's
    copies: int = 1  # the processes that hold these very samples

    def read_by(self, slot: Slot) -> Heard:
        """As a loss is given it: the teachers that it hears, and tensors also under its names."""
        mine, theirs = slot.reads.get("student"), slot.reads.get("teacher")
        said = {n: streams.renamed(self.teachers[n], theirs) for n in slot.teachers if n in self.teachers}
        return replace(self, student=streams.renamed(self.student, mine), teachers=said)

    def gathered(self) -> Heard:
        """The same of all ranks' samples, differentiably."""
        batch, student = streams.gathered_batch(self.batch), streams.gathered(self.student)
        teachers = {name: streams.gathered(said) for name, said in self.teachers.items()}
        return replace(self, batch=batch, student=student, teachers=teachers, copies=parallel.world())


def by_stream(heard: Iterable[Heard]) -> tuple[Streams, dict[str, Streams]]:
    """The student's answers by stream, and those of each teacher that gave one."""
    student: Streams = {}
    teachers: dict[str, Streams] = {}
    for each in heard:
        student[each.stream] = each.student
        for name, said in each.teachers.items():
            teachers.setdefault(name, {})[each.stream] = said
    return student, teachers


def whole_batch(heard: Sequence[Heard], like: Batch) -> Batch:
    """The batch of these streams, in the form of ``like``: in parts, or of one stream."""
    return Batch(parts={each.stream: each.batch for each in heard}) if like.parts else heard[0].batch


@dataclass
class Pass:
    """One forward of everything: what was heard by stream, and the terms so far, name -> (weight, scalar)."""

    batch: Batch
    counts: Counts
    heard: dict[str, Heard]
    terms: dict[str, tuple[float, Tensor]] = field(default_factory=dict)

    def of(self, names: tuple[str, ...] | None) -> list[Heard]:
        """The streams asked for; all for None, and the only one of a batch without streams for any name."""
        if not names or not self.batch.parts:
            return list(self.heard.values())
        for name in names:
            self.batch.part(name)  # refuses a stream that is not there
        return [self.heard[name] for name in names]

    def add(self, name: str, weight: float, value: Terms | None, heard: Heard) -> None:
        """Add a term, or several by name, as shares of the global batch's mean; None is no term.

        Another stream or teacher of a term that is there is added to it, under the first one's weight.
        """
        named = value if isinstance(value, dict) else {} if value is None else {"": value}
        for part, term in named.items():
            share = self.counts.share(term, heard.stream, heard.student, heard.batch)
            share = share if heard.copies == 1 else share / heard.copies
            key = f"{name}.{part}" if part else name
            first, before = self.terms.get(key, (weight, None))
            self.terms[key] = first, share if before is None else before + share * (weight / first)

    def objective(self) -> Tensor:
        """The weighted sum of the terms."""
        first, *others = [value if weight == 1.0 else weight * value for weight, value in self.terms.values()]
        return sum(others, first)


class Objective(nn.Module):
    """A run's models and components as one module; of a batch, it is what training minimises."""

    run: RunContext

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts, self.teachers = parts, parts.teachers  # frozen teachers are no submodules
        self.student, self.router = parts.student, parts.router
        self.kept = nn.ModuleDict({n: t for n, t in parts.teachers.items() if t.saved})
        self.augmentations = nn.ModuleDict(parts.augmentations)
        self.losses = nn.ModuleList(slot.loss for slot in parts.losses)
        self.accumulate = 1  # micro-batches a step
        self.grad_through = False  # whether a component sends gradient through the teachers

    def to(self, *args: Any, **kwargs: Any) -> Self:
        for teacher in self.teachers.values():
            teacher.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Teachers keep eval mode: also what a component holds of one, and what one's setup made."""
        super().train(mode)
        for module in (m for teacher in self.teachers.values() if mode for m in teacher.modules()):
            module.training = False
        return self

    def forward(self, batch: Batch) -> Tensor:
        """The objective of a batch: the weighted sum of its terms."""
        return self.hear(batch, Counts()).objective()

    def terms(self, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, scalar) of every term of a global batch, on its graph."""
        return self.hear(batch, Counts()).terms

    def hear(self, batch: Batch, counts: Counts) -> Pass:
        """Ask everybody about a batch, and make the terms of the answers."""
        now = Pass(batch, counts, self._student(batch))
        for heard in now.heard.values() if self.router is not None or self.parts.needs else ():
            self._teach(heard, now)
        for slot in self.parts.losses:
            if weight := slot.weight_at(self.run.progress):
                self._loss(slot, weight, now)
        if self.parts.task_weight and not any(slot.loss.hard_term for slot in self.parts.losses):
            self._task(now)
        if not now.terms:
            learner = self.parts.student.place or "student"
            problem = "no loss acts here" if self.parts.losses else "learns from labels alone"
            place = learner if learner == "student" else f"{learner}.train"
            raise InputError(place, f"{problem}, and its batches hold no 'target'", given=sorted(batch))
        return now

    def ask(
        self, name: str, batch: Batch, grad: bool = False, replace: Replace | None = None, stop: bool = False
    ) -> Outputs:
        """What a model says of a batch, with its taps' tensors by module path; a teacher's gradient if ``grad``.

        ``replace`` gives taps' new values; ``stop`` ends a forward once all taps are read.
        """
        model = self.student if name == "student" else self.teachers[name]
        view, taps = self.parts.views.get(name), self.parts.taps.get(name)
        shown, outputs = streams.viewed(batch, view), Outputs()
        reading: Any = taps.reading(replace, stop) if taps is not None else nullcontext({})
        grad = (grad or name == "student") and torch.is_grad_enabled()
        with torch.set_grad_enabled(grad), reading as tensors:
            outputs = streams.aligned(model(shown), shown, view)
        return streams.with_tensors(outputs, tensors) if tensors else outputs

    def hard_terms(self, outputs: Outputs, batch: Batch) -> Terms | None:
        """The task's terms of these outputs: the student's own, or else the recipe's task's."""
        own = self.student.task_loss(outputs, batch)
        return self.parts.task.terms(outputs, batch) if own is None else own

    def read(self, heard: Heard, slot: Slot) -> Heard:
        """What a loss is given of a stream. InputError where a model gives none of its tensors, and no path is named."""
        given = heard.read_by(slot)
        for side, _, name in (want.partition(".") for want in slot.loss.wants()):
            told = given.teachers if side == "teacher" else {"student": given.student}
            for model, said in told.items():
                if name not in said and name not in FIELDS:
                    owner = self.student if model == "student" else self.teachers[model]
                    place, paths = f"{slot.loss.place}.reads.{side}.{name}", dict(owner.model.named_modules())
                    problem, hint = f"the {side} gives no {name!r} itself", f'reads.{side}.{name} = "PATH"'
                    raise InputError(place, f"{problem}: name the module", allowed=[*paths][1:], hint=hint)
        return given

    def culprit(self, now: Pass) -> tuple[str, str] | None:
        """The first that is not finite of inputs, teachers' answers and the student's: its place, and its name."""
        for bad in (torch.isnan, torch.isinf):
            for heard in now.heard.values():
                told = {f"teacher.{name}": said.named() for name, said in heard.teachers.items()}
                place = self.parts.student.place or "student"
                for who, values in {
                    "data.source": heard.batch.items(),
                    **told,
                    place: heard.student.named(),
                }.items():
                    for name, value in values:
                        if isinstance(value, Tensor) and value.is_floating_point() and bad(value).any():
                            return who, name
        return None

    def _student(self, batch: Batch) -> dict[str, Heard]:
        if not batch.parts:
            said = {"main": self.ask("student", batch)}
        elif self.parts.forward == "separate":
            said = {name: self.ask("student", part) for name, part in batch.parts.items()}
        else:
            joint = self.ask("student", streams.concatenated(batch.parts))
            said = streams.separated(joint, batch.parts)
        return {name: Heard(name, batch.part(name), outputs) for name, outputs in said.items()}

    def _teach(self, heard: Heard, now: Pass) -> None:
        """Ask the teachers that somebody reads, routed ones only on their rows; then the router weighs them."""
        plan = None if self.router is None else self.router.plan(heard.batch, heard.student)
        for name in self.parts.needs:
            hearing = [slot.streams for slot in self.parts.losses if name in slot.teachers]
            if name in self.parts.routed or any(heard in now.of(names) for names in hearing):
                chosen = self._column(plan, name)
                rows = None if chosen is None else chosen.nonzero().flatten()
                if rows is None or len(rows):
                    heard.teachers[name] = self._teacher(name, heard.batch, rows)
        if self.router is not None:
            told = {name: heard.teachers[name] for name in self.parts.routed if name in heard.teachers}
            answer = self.router(heard.batch, heard.student, told)
            heard.weights, terms = answer if isinstance(answer, tuple) else (answer, {})
            self._check_accumulation(terms)
            now.add("router", 1.0, terms, heard)

    def _column(self, table: Tensor | None, teacher: str) -> Tensor | None:
        """A routed teacher's column [B] of the router's plan or weights [B,K]."""
        routed = self.parts.routed
        return None if table is None or teacher not in routed else table[:, routed.index(teacher)]

    def _teacher(self, name: str, part: Batch, rows: Tensor | None) -> Outputs:
        """A teacher's answer, for some rows alone; its forward ends where nothing further is read."""
        taps = self.parts.taps.get(name)
        stop = taps is not None and self.parts.needs[name] <= set(taps.names)
        if rows is None:
            return self.ask(name, part, self.grad_through, stop=stop)
        return replace(self.ask(name, part.rows(rows), self.grad_through, stop=stop), rows=rows)

    def _check_accumulation(self, terms: dict[str, Tensor]) -> None:
        scalars = [name for name, term in terms.items() if term.dim() == 0]
        if scalars and self.accumulate > 1:
            problem = f"its term {scalars[0]!r} is one value a batch: over micro-batches it would be another"
            given, hint = f"train.accumulate = {self.accumulate}", "take it out, or lower batch_size"
            raise InputError("router", problem, given=given, hint=hint)

    def _loss(self, slot: Slot, weight: float, now: Pass) -> None:
        loss = slot.loss
        heard = [self.read(each, slot) for each in now.of(None if loss.all_streams else slot.streams)]
        if loss.couples_batch and parallel.world() > 1:
            heard = [each.gathered() for each in heard]
        if loss.all_streams:
            batch = whole_batch(heard, now.batch)
            value = loss(*by_stream(heard), batch)
            now.add(slot.name, weight, value, Heard(ALL, batch, Outputs(), copies=heard[0].copies))
            return
        for each in heard:
            if loss.joint or not slot.teachers:
                value = loss(each.student, each.teachers if loss.joint else None, each.batch)
                now.add(slot.name, weight, value, each)
            else:
                self._by_teacher(slot, weight, each, now)

    def _by_teacher(self, slot: Slot, weight: float, heard: Heard, now: Pass) -> None:
        """A term a teacher: the mean over them, or, of routed ones, what the router's weights make of it."""
        for name, said in heard.teachers.items():
            student, batch = heard.student, heard.batch
            if said.rows is not None:
                student, batch = student.at(said.rows), batch.rows(said.rows)
            value, share = slot.loss(student, said, batch), weight / len(slot.teachers)
            if (column := self._column(heard.weights, name)) is not None:
                value, share = weighed(value, column, said.rows, slot.name), weight
            now.add(slot.name, share, value, heard)

    def _task(self, now: Pass) -> None:
        for heard in now.of(self.parts.task_streams):
            value = self.hard_terms(heard.student, heard.batch)
            if self.router is not None and self.router.labels_column and heard.weights is not None:
                value = weighed(value, heard.weights[:, -1], None, "task")
            now.add("task", self.parts.task_weight, value, heard)
