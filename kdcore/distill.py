"""The step of ``distill``: what one optimiser update computes.

batch -> augment -> before_step -> student -> plan -> teachers -> weights -> losses -> task loss -> backward
-> merge -> optimisers -> after_step. Every term is a sum over the global batch divided by its global count,
so micro-batches and ranks do not change the objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcore import parallel, sharding
from kdcore.context import RunContext
from kdcore.counts import ALL, Counts, routed
from kdcore.errors import InputError, KDError
from kdcore.events import events_of
from kdcore.guards import Guards
from kdcore.kinds import Kind, Teacher, Terms
from kdcore.parts import Parts, Slot
from kdcore.streams import (
    Streams,
    aligned,
    concatenated,
    gathered,
    gathered_batch,
    joined,
    renamed,
    separated,
    viewed,
    with_tensors,
)
from kdcore.taps import Replace
from kdcore.types import Batch, Outputs


@dataclass
class Pass:
    """One forward of everything: what the models said by stream, the router's weights, the terms so far."""

    batch: Batch
    student: Streams
    teachers: dict[str, Streams] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, tuple[float, Tensor]] = field(default_factory=dict)

    def heard(self, streams: tuple[str, ...] | None) -> tuple[str, ...]:
        """The streams that are asked for; all for None, and the only one of a batch without streams for any name."""
        return streams if streams and self.batch.parts else tuple(self.student)

    def add(self, name: str, weight: float, value: Tensor) -> None:
        """Another stream or teacher of a term that is there is added to it, under the first one's weight."""
        if name in self.terms:
            first, sum_ = self.terms[name]
            self.terms[name] = first, sum_ + value * (weight / first if first else 1.0)
        else:
            self.terms[name] = weight, value


class Distiller(nn.Module):
    """Student and components as one module; ``train_step`` is one optimiser update."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.student = parts.student
        self.kept = nn.ModuleDict({n: t for n, t in parts.teachers.items() if t.saved})
        self.router = parts.router
        self.augmentations = nn.ModuleDict(parts.augmentations)
        self.losses = nn.ModuleList(slot.loss for slot in parts.losses)
        self._events: Any = None
        self._merger: Any = None
        self._grad_through = False
        self.guards = Guards()
        self.run: RunContext
        self.accumulate = 1
        self._counts = Counts()
        self._last = Pass(Batch(), {})

    @property
    def teachers(self) -> dict[str, Teacher]:
        return self.parts.teachers

    @property
    def events(self) -> Any:
        return self._events

    def attach(self, run: RunContext) -> None:
        """Give every component its ``run`` and make the events' manager."""
        self.run = run
        found = self.parts.components()
        for _, component in found:
            component.run = run
        self._events = events_of(found)
        self._merger = next((c for _, c in found if hasattr(c, "merge")), None)
        self._grad_through = any(c.grad_through for _, c in found)

    def name_of(self, component: Kind) -> str:
        return next(name for name, each in self.parts.components() if each is component)

    def to(self, *args: Any, **kwargs: Any) -> Distiller:
        for teacher in self.parts.teachers.values():  # the frozen ones are not submodules
            teacher.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        for teacher in self.parts.teachers.values():
            teacher.eval()
        for module in self.parts.hold_eval:
            module.eval()
        return self

    # ---- one update -------------------------------------------------------------------------------

    def train_step(self, data: Batch, optim_wrapper: Any) -> dict[str, Tensor]:
        """One optimiser update on a (rank's share of a) global batch; returns the terms' values."""
        run = self.run
        run.reseed("step", run.step, shared=False)
        batch = data.to(run.device)
        for augmentation in self.parts.augmentations.values():
            batch = augmentation(batch)
        self._events.before_step(batch=batch)
        self.guards.witness(batch, self.student, self.parts.teachers, run.step)
        chunks = batch.chunks(self.accumulate)
        alone = len(chunks) == 1 and parallel.world() == 1
        view = self.parts.views.get("student")
        self._counts = Counts() if alone else Counts.of(batch, self.student, run.device, view)
        logs: dict[str, Tensor] = {}
        kept: list[Pass] = []
        grads: dict[str, list[Tensor | None]] = {}
        for chunk in chunks:
            with optim_wrapper.optim_context(self):
                terms = self.terms(chunk)
            with sharding.asked_only(self.student):
                self.guards.look(terms, self._last.student, run.step)
            if self._merger is not None:
                self._collect(grads, terms)
            optim_wrapper.backward(_weighted(terms))
            for name, (_, value) in terms.items():
                logs[name] = logs.get(name, 0) + value.detach()
            kept.append(self._last)
        parallel.average_gradients(self._trained(optim_wrapper), mean=False)
        if self._merger is not None:
            self._merge(grads)
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        run.terms = logs  # type: ignore[assignment]
        run.step += 1
        sharding.rest([self.student, *self.parts.teachers.values()])
        self._after(batch, kept)
        return logs

    def forward(self, batch: Batch) -> Tensor:
        """The objective of a batch: the weighted sum of its terms."""
        if sharding.is_sharded(self.student):
            raise KDError("run.objective puts tensors in the place of parameters, which fsdp does not allow")
        counts, self._counts = self._counts, Counts()
        try:
            return _weighted(self.terms(batch))
        finally:
            self._counts = counts

    def _collect(
        self, grads: dict[str, list[Tensor | None]], terms: Mapping[str, tuple[float, Tensor]]
    ) -> None:
        """Add each weighted term's gradient at the student's parameters; None where it has none."""
        params = self._students()
        for name, (weight, value) in ((n, each) for n, each in terms.items() if each[1].requires_grad):
            fresh = torch.autograd.grad(weight * value, params, retain_graph=True, allow_unused=True)
            before = grads.get(name, [None] * len(params))
            grads[name] = [
                b if f is None else f if b is None else b + f for b, f in zip(before, fresh, strict=True)
            ]

    def _merge(self, grads: Mapping[str, list[Tensor | None]]) -> None:
        """Put what the merger makes of the terms' gradients (global batch) in the place of their sum."""
        params = self._students()
        whole = {}
        for name, each in grads.items():
            for param, grad in zip(params, each, strict=True):
                param.grad = grad
            parallel.average_gradients(params, mean=False)
            whole[name] = [param.grad for param in params]
        for param, grad in zip(params, self._merger.merge(whole), strict=True):
            param.grad = grad

    def _students(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    @staticmethod
    def _trained(optim_wrapper: Any) -> list[nn.Parameter]:
        return [p for group in optim_wrapper.optimizer.param_groups for p in group["params"]]

    def _after(self, batch: Batch, kept: Sequence[Pass]) -> None:
        if not self._events.after_step.get_hookimpls():
            return
        chunks = [each.batch for each in kept]
        student = joined(chunks, [each.student for each in kept])
        names = dict.fromkeys(name for each in kept for name in each.teachers)
        teachers: dict[str, Any] = {n: joined(chunks, [each.teachers[n] for each in kept]) for n in names}
        if parallel.world() > 1 and self.router is None:  # every rank's state sees the global batch
            student = {stream: gathered(each) for stream, each in student.items()}
            teachers = {n: {k: gathered(o) for k, o in each.items()} for n, each in teachers.items()}
            batch = gathered_batch(batch)
        if not batch.parts:
            teachers = {name: each["main"] for name, each in teachers.items() if each}
        self._events.after_step(
            batch=batch, student=student if batch.parts else student["main"], teachers=teachers
        )

    # ---- terms ------------------------------------------------------------------------------------

    def terms(self, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, scalar) of every term of a batch, on its graph."""
        now = Pass(batch, self._student(batch))
        if self.router is not None or self.parts.needs:
            self._teach(now)
        hard = False
        for slot in self.parts.losses:
            hard = hard or slot.loss.hard_term
            weight = slot.weight_at(self.run.progress)
            if weight:
                self._loss(slot, weight, now)
        if not hard and self.parts.task_weight:
            self._hard(now)
        if not now.terms:
            raise KDError("no loss has a term here: the recipe has no [[loss]], and the batch no target")
        self._last = now
        return now.terms

    def _student(self, batch: Batch) -> Streams:
        if not batch.parts:
            return {"main": self.ask("student", batch)}
        if self.parts.forward == "separate":
            return {name: self.ask("student", part) for name, part in batch.parts.items()}
        return separated(self.ask("student", concatenated(batch.parts)), batch.parts)

    def _teach(self, now: Pass) -> None:
        """Ask the teachers that somebody reads, routed ones only on their rows; fill the router's weights."""
        now.teachers = {name: {} for name in self.parts.needs}
        for stream, outputs in now.student.items():
            part = now.batch.part(stream)
            plan = self.router.plan(part, outputs) if self.router is not None else None
            for name in (n for n in self.parts.needs if self._wanted(n, stream, now)):
                rows = (
                    None
                    if plan is None or not self._routes(name)
                    else self._column(plan, name).nonzero().flatten()
                )
                if rows is None or len(rows):
                    now.teachers[name][stream] = self._asked(name, part, rows)
            if self.router is None:
                continue
            told = {n: now.teachers[n][stream] for n in self.parts.routed if stream in now.teachers[n]}
            answer = self.router(part, outputs, told)
            now.weights[stream], extra = answer if isinstance(answer, tuple) else (answer, {})
            for name, value in extra.items():
                if value.dim() == 0 and self.accumulate > 1:
                    problem = (
                        f"its term {name!r} is one value a batch: over micro-batches it would be another"
                    )
                    given, hint = f"train.accumulate = {self.accumulate}", "take it out, or lower batch_size"
                    raise InputError("router", problem, given=given, hint=hint)
                now.add(f"router.{name}", 1.0, self._counts.share(value, stream, outputs, part))

    def _routes(self, teacher: str) -> bool:
        return self.router is not None and teacher in self.parts.routed

    def _column(self, table: Tensor, teacher: str) -> Tensor:
        return table[:, self.parts.routed.index(teacher)]

    def _wanted(self, teacher: str, stream: str, now: Pass) -> bool:
        hearing = (slot.streams for slot in self.parts.losses if teacher in slot.teachers)
        return self._routes(teacher) or any(stream in now.heard(streams) for streams in hearing)

    def _asked(self, name: str, part: Batch, rows: Tensor | None) -> Outputs:
        taps, needs = self.parts.taps.get(name), self.parts.needs[name]
        stop = taps is not None and needs <= set(taps.names)
        stop = stop and not sharding.is_sharded(self.teachers[name])  # such a forward ends whole
        with torch.set_grad_enabled(self._grad_through and torch.is_grad_enabled()):
            outputs = self.ask(name, part if rows is None else part.rows(rows), stop=stop)
        return outputs if rows is None else replace(outputs, rows=rows)

    def _loss(self, slot: Slot, weight: float, now: Pass) -> None:
        if not slot.loss.all_streams:
            for stream in now.heard(slot.streams):
                self._loss_of(stream, slot, weight, now)
            return
        mine, theirs = slot.reads.get("student"), slot.reads.get("teacher")
        student = {stream: renamed(outputs, mine) for stream, outputs in now.student.items()}
        teachers = {n: {s: renamed(o, theirs) for s, o in now.teachers[n].items()} for n in slot.teachers}
        self._add(slot, weight, slot.loss(student, teachers, now.batch), ALL, None, now.batch, now)

    def _loss_of(self, stream: str, slot: Slot, weight: float, now: Pass) -> None:
        loss, part = slot.loss, now.batch.part(stream)
        outputs = renamed(now.student[stream], slot.reads.get("student"))
        heard = {n: now.teachers[n][stream] for n in slot.teachers if stream in now.teachers[n]}
        said = {n: renamed(o, slot.reads.get("teacher")) for n, o in heard.items()}
        if loss.couples_batch and parallel.world() > 1:
            outputs, part = gathered(outputs), gathered_batch(part)
            said = {n: gathered(o) for n, o in said.items()}
        if loss.joint or not slot.teachers:
            value = loss(outputs, said if loss.joint else None, part)
            self._add(slot, weight, value, stream, outputs, part, now)
            return
        for name, each in said.items():
            mine, here = (
                (outputs, part) if each.rows is None else (outputs.at(each.rows), part.rows(each.rows))
            )
            value, share = loss(mine, each, here), weight / len(slot.teachers)
            if self._routes(name):
                column = self._column(now.weights[stream], name)
                value, share = routed(value, column, each.rows, slot.name), weight
            self._add(slot, share, value, stream, outputs, part, now)

    def _add(
        self,
        slot: Slot,
        weight: float,
        value: Terms | None,
        stream: str,
        outputs: Outputs | None,
        part: Batch,
        now: Pass,
    ) -> None:
        """Add a loss's term or named terms as shares of the global batch's mean; None is no term."""
        named = value if isinstance(value, dict) else {} if value is None else {"": value}
        coupled = slot.loss.couples_batch and parallel.world() > 1
        for part_name, term in named.items():
            name = f"{slot.name}.{part_name}" if part_name else slot.name
            if coupled:
                reduced = Counts().share(term, stream, outputs, part) / parallel.world()
            else:
                reduced = self._counts.share(term, stream, outputs, part)
            now.add(name, weight, reduced)

    def _hard(self, now: Pass) -> None:
        for stream in now.heard(self.parts.task_streams):
            part, outputs = now.batch.part(stream), now.student[stream]
            value = self.hard_terms(outputs, part)
            if value is None:
                continue
            for name, term in (value if isinstance(value, dict) else {"": value}).items():
                if self.router is not None and self.router.labels_column and stream in now.weights:
                    term = routed(term, now.weights[stream][:, -1], None, "task")
                key = f"task.{name}" if name else "task"
                now.add(key, self.parts.task_weight, self._counts.share(term, stream, outputs, part))

    def hard_terms(self, outputs: Outputs, batch: Batch) -> Any:
        own = self.student.task_loss(outputs, batch)
        return own if own is not None else self.parts.task.terms(outputs, batch)

    def ask(self, name: str, batch: Batch, replace: Replace | None = None, stop: bool = False) -> Outputs:
        """What a model says of a batch, with its taps' tensors by module path."""
        model = self.student if name == "student" else self.teachers[name]
        view = self.parts.views.get(name)
        mine, taps = viewed(batch, view), self.parts.taps.get(name)
        if taps is None:
            return aligned(model(mine), mine, view)
        outputs = Outputs()
        with taps.reading(replace, stop) as seen:
            outputs = aligned(model(mine), mine, view)
        if sharding.is_sharded(model):
            sharding.cover(model, model.model, seen)
        return with_tensors(outputs, seen)


def _weighted(terms: Mapping[str, tuple[float, Tensor]]) -> Tensor:
    total: Tensor | None = None
    for weight, value in terms.values():
        part = value if weight == 1.0 else weight * value
        total = part if total is None else total + part
    assert total is not None
    return total
