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

from kdcore import parallel
from kdcore.context import RunContext
from kdcore.errors import InputError, KDError
from kdcore.events import events_of
from kdcore.guards import Guards
from kdcore.kinds import Augmentation, Kind, Loss, Router, Student, Teacher
from kdcore.tables import Ramp
from kdcore.taps import Replace, Taps
from kdcore.task import Task
from kdcore.types import Batch, Outputs, Unembed

Streams = dict[str, Outputs]


@dataclass
class Slot:
    """A loss with what the recipe says of it. ``reads``: side -> name -> module path (or output name)."""

    name: str
    loss: Loss
    weight: float | Ramp = 1.0
    teachers: tuple[str, ...] = ()
    streams: tuple[str, ...] | None = None
    reads: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def weight_at(self, progress: float) -> float:
        return self.weight.at(progress) if isinstance(self.weight, Ramp) else self.weight


@dataclass
class Parts:
    """What a run is made of, built and checked."""

    student: Student
    task: Task
    teachers: dict[str, Teacher] = field(default_factory=dict)
    router: Router | None = None
    routed: tuple[str, ...] = ()
    augmentations: dict[str, Augmentation] = field(default_factory=dict)
    losses: list[Slot] = field(default_factory=list)
    taps: dict[str, Taps] = field(default_factory=dict)
    needs: dict[str, set[str]] = field(default_factory=dict)
    views: dict[str, Mapping[str, str]] = field(default_factory=dict)
    task_weight: float = 1.0
    task_streams: tuple[str, ...] | None = None
    forward: str = "joint"
    hold_eval: tuple[nn.Module, ...] = ()

    def components(self) -> list[tuple[str, Kind]]:
        """(name, component) in the recipe's order."""
        return [
            ("student", self.student),
            *((f"teacher.{name}", teacher) for name, teacher in self.teachers.items()),
            *([("router", self.router)] if self.router is not None else []),
            *((f"augmentation.{name}", each) for name, each in self.augmentations.items()),
            *((f"loss.{slot.name}", slot.loss) for slot in self.losses),
        ]


@dataclass
class Counts:
    """Global counts of the step, by stream: samples, and supervised positions where those are known."""

    samples: dict[str, float]
    tokens: dict[str, float]


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
        self.guards = Guards()
        self.run: RunContext
        self.accumulate = 1
        self._counts = Counts({}, {})
        self._seen: tuple[Streams, dict[str, Streams]] = ({}, {})

    @property
    def teachers(self) -> dict[str, Teacher]:
        return self.parts.teachers

    @property
    def events(self) -> Any:
        return self._events

    def attach(self, run: RunContext) -> None:
        """Give every component its ``run`` and make the events' manager."""
        self.run = run
        for _, component in self.parts.components():
            component.run = run
        self._events = events_of(self.parts.components())

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
        run.reseed("step", run.step)
        batch = data.to(run.device)
        for augmentation in self.parts.augmentations.values():
            batch = augmentation(batch)
        self._events.before_step(batch=batch)
        self.guards.witness(batch, self.student, self.parts.teachers, run.step)
        chunks = batch.chunks(self.accumulate)
        self._count(batch, len(chunks))
        logs: dict[str, Tensor] = {}
        kept: list[tuple[Streams, dict[str, Streams]]] = []
        for chunk in chunks:
            with optim_wrapper.optim_context(self):
                terms = self.terms(chunk)
            self._backward(terms, optim_wrapper)
            for name, (_, value) in terms.items():
                logs[name] = logs.get(name, 0) + value.detach()
            kept.append(self._seen)
        parallel.average_gradients(self._trained(optim_wrapper), mean=False)
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        run.terms = logs  # type: ignore[assignment]
        run.step += 1
        self._after(batch, kept)
        return logs

    def forward(self, batch: Batch) -> Tensor:
        """The objective of a batch: the weighted sum of its terms."""
        counts, self._counts = self._counts, Counts({}, {})
        try:
            return _weighted(self.terms(batch))
        finally:
            self._counts = counts

    def _backward(self, terms: dict[str, tuple[float, Tensor]], optim_wrapper: Any) -> None:
        self.guards.look(terms, self._seen[0], self.run.step)
        merger = next((c for _, c in self.parts.components() if hasattr(c, "merge")), None)
        if merger is None:
            optim_wrapper.backward(_weighted(terms))
            return
        params = [p for p in self.student.parameters() if p.requires_grad]
        grads = {
            name: list(torch.autograd.grad(weight * value, params, retain_graph=True, allow_unused=True))
            for name, (weight, value) in terms.items()
        }
        optim_wrapper.backward(_weighted(terms))  # the components' own parameters; the student's are replaced
        for param, grad in zip(params, merger.merge(grads), strict=True):
            param.grad = grad

    @staticmethod
    def _trained(optim_wrapper: Any) -> list[nn.Parameter]:
        return [p for group in optim_wrapper.optimizer.param_groups for p in group["params"]]

    def _after(self, batch: Batch, kept: Sequence[tuple[Streams, dict[str, Streams]]]) -> None:
        if not self._events.after_step.get_hookimpls():
            return
        student = _joined([seen[0] for seen in kept])
        teachers = {name: _joined([seen[1][name] for seen in kept]) for name in kept[0][1]}
        single = len(student) == 1
        first = next(iter(student))
        self._events.after_step(
            batch=batch,
            student=student[first] if single else student,
            teachers={name: each[first] if single else each for name, each in teachers.items()},
        )

    # ---- terms ------------------------------------------------------------------------------------

    def terms(self, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, scalar) of every term of a batch, on its graph."""
        student = self._student(batch)
        teachers: dict[str, Streams] = {}
        weights: dict[str, Tensor] = {}
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.router is not None or self.parts.needs:
            self._teach(batch, student, teachers, weights, terms)
        hard = False
        for slot in self.parts.losses:
            hard = hard or slot.loss.hard_term
            weight = slot.weight_at(self.run.progress)
            if weight:
                self._loss(slot, weight, batch, student, teachers, weights, terms)
        if not hard and self.parts.task_weight:
            self._hard(batch, student, weights, terms)
        if not terms:
            raise KDError("no loss has a term here: the recipe has no [[loss]], and the batch no target")
        self._seen = student, teachers
        return terms

    def _student(self, batch: Batch) -> Streams:
        if not batch.parts:
            return {"main": self.ask("student", batch)}
        if self.parts.forward == "separate":
            return {name: self.ask("student", part) for name, part in batch.parts.items()}
        whole, sizes = _concat(batch.parts)
        outputs, start, found = self.ask("student", whole), 0, {}
        for name, size in sizes.items():
            found[name] = outputs.at(slice(start, start + size))
            start += size
        return found

    def _teach(
        self,
        batch: Batch,
        student: Streams,
        teachers: dict[str, Streams],
        weights: dict[str, Tensor],
        terms: dict[str, tuple[float, Tensor]],
    ) -> None:
        """Ask the teachers that somebody reads, routed ones only on their rows; fill the router's weights."""
        teachers.update({name: {} for name in self.parts.needs})
        for stream, outputs in student.items():
            part = batch.part(stream)
            plan = self.router.plan(part, outputs) if self.router is not None else None
            for name in self.parts.needs:
                rows = None
                if plan is not None and name in self.parts.routed:
                    rows = plan[:, self.parts.routed.index(name)].nonzero().flatten()
                    if not len(rows):
                        continue
                teachers[name][stream] = self._asked(name, part, rows)
            if self.router is None:
                continue
            routed = {n: teachers[n][stream] for n in self.parts.routed if stream in teachers[n]}
            answer = self.router(part, outputs, routed)
            weights[stream], extra = answer if isinstance(answer, tuple) else (answer, {})
            for name, value in extra.items():
                self._add(terms, f"router.{name}", 1.0, self._reduced(value, stream, outputs, part))

    def _asked(self, name: str, part: Batch, rows: Tensor | None) -> Outputs:
        grad = any(component.grad_through for _, component in self.parts.components())
        taps, needs = self.parts.taps.get(name), self.parts.needs[name]
        stop = taps is not None and needs <= set(taps.names)
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            outputs = self.ask(name, part if rows is None else part.rows(rows), stop=stop)
        return outputs if rows is None else replace(outputs, rows=rows)

    def _loss(
        self,
        slot: Slot,
        weight: float,
        batch: Batch,
        student: Streams,
        teachers: dict[str, Streams],
        weights: dict[str, Tensor],
        terms: dict[str, tuple[float, Tensor]],
    ) -> None:
        if slot.loss.all_streams:
            first = {n: t for n, t in teachers.items() if n in slot.teachers}
            self._each(slot, weight, slot.loss(student, first, batch), "", None, batch, terms)
            return
        for stream in slot.streams or tuple(student):
            part, outputs = batch.part(stream), _named(student[stream], slot.reads.get("student"))
            said = {
                name: _named(teachers[name][stream], slot.reads.get("teacher"))
                for name in slot.teachers
                if stream in teachers.get(name, {})
            }
            if slot.loss.couples_batch and parallel.world() > 1:
                outputs, said, part = _gathered(outputs), {n: _gathered(o) for n, o in said.items()}, _gathered_batch(part)
            if slot.loss.joint or not slot.teachers:
                self._each(slot, weight, slot.loss(outputs, said if slot.loss.joint else None, part), stream, outputs, part, terms)
                continue
            for name, each in said.items():
                mine, here = (outputs, part) if each.rows is None else (outputs.at(each.rows), part.rows(each.rows))
                value = slot.loss(mine, each, here)
                if stream in weights and name in self.parts.routed:
                    column = weights[stream][:, self.parts.routed.index(name)]
                    column = column if each.rows is None else column[each.rows]
                    value = _routed(value, column, slot.name)
                    share = weight
                else:
                    share = weight / len(slot.teachers)
                self._each(slot, share, value, stream, mine, here, terms)

    def _each(
        self,
        slot: Slot,
        weight: float,
        value: Tensor | dict[str, Tensor],
        stream: str,
        outputs: Outputs | None,
        part: Batch,
        terms: dict[str, tuple[float, Tensor]],
    ) -> None:
        """Add a loss's term or named terms, reduced over the global batch."""
        named = value if isinstance(value, dict) else {"": value}
        coupled = slot.loss.couples_batch and parallel.world() > 1
        for part_name, term in named.items():
            name = f"{slot.name}.{part_name}" if part_name else slot.name
            if coupled:
                reduced = (term.mean() if term.dim() else term) / parallel.world()
            else:
                reduced = self._reduced(term, stream, outputs, part)
            self._add(terms, name, weight, reduced)

    def _hard(
        self, batch: Batch, student: Streams, weights: dict[str, Tensor], terms: dict[str, tuple[float, Tensor]]
    ) -> None:
        for stream in self.parts.task_streams or tuple(student):
            part, outputs = batch.part(stream), student[stream]
            value = self.hard_terms(outputs, part)
            if value is None:
                continue
            for name, term in (value if isinstance(value, dict) else {"": value}).items():
                if self.router is not None and self.router.labels_column and stream in weights:
                    term = _routed(term, weights[stream][:, -1], "task")  # noqa: PLW2901
                key = f"task.{name}" if name else "task"
                self._add(terms, key, self.parts.task_weight, self._reduced(term, stream, outputs, part))

    def hard_terms(self, outputs: Outputs, batch: Batch) -> Any:
        own = self.student.task_loss(outputs, batch)
        return own if own is not None else self.parts.task.terms(outputs, batch)

    @staticmethod
    def _add(terms: dict[str, tuple[float, Tensor]], name: str, weight: float, value: Tensor) -> None:
        if name in terms:  # another stream or teacher of the same term: one line in the log, weights kept
            old_weight, old = terms[name]
            value = old + value * (weight / old_weight if old_weight else 1.0)
            weight = old_weight
        terms[name] = (weight, value)

    def _reduced(self, term: Tensor, stream: str, outputs: Outputs | None, part: Batch) -> Tensor:
        """A term as its share of the global mean: over samples for [B], over supervised positions for [B,L]."""
        size = self._counts.samples.get(stream, len(part))
        if term.dim() == 0:
            return term * (len(part) / size) if size else term
        if term.dim() == 1:
            return term.sum() / max(size, 1)
        mask = _mask(term, outputs, part)
        if mask is None:
            return term.flatten(1).mean(1).sum() / max(size, 1)
        count = self._counts.tokens.get(stream)
        chosen = torch.where(mask, term, term.new_zeros(()))
        return chosen.sum() / max(count if count is not None else float(mask.sum()), 1.0)

    def _count(self, batch: Batch, chunks: int) -> None:
        """The step's global counts; needed only where the global batch is more than this chunk."""
        self._counts = Counts({}, {})
        if chunks == 1 and parallel.world() == 1:
            return
        for stream in batch.streams:
            part = batch.part(stream)
            self._counts.samples[stream] = parallel.total(len(part), self.run.device)
            mask = supervised(self.student, part)
            if mask is not None:
                self._counts.tokens[stream] = parallel.total(mask.sum(), self.run.device)

    def ask(self, name: str, batch: Batch, replace: Replace | None = None, stop: bool = False) -> Outputs:
        """What a model says of a batch, with its taps' tensors by module path."""
        model = self.student if name == "student" else self.teachers[name]
        mine = batch.copy()
        for key, source in self.parts.views.get(name, {}).items():
            mine[key] = batch[source]
        taps = self.parts.taps.get(name)
        if taps is None:
            return model(mine)  # type: ignore[no-any-return]
        outputs = Outputs()
        with taps.reading(replace, stop) as seen:
            outputs = model(mine)
        return _replaced(outputs, seen)


def supervised(student: Student, part: Batch) -> Tensor | None:
    """Bool [B,L]: the positions that count, known before any forward; the student's adapter may say."""
    if hasattr(student, "supervised"):
        return student.supervised(part)  # type: ignore[no-any-return,operator]
    if "mask" in part:
        return part["mask"].bool()  # type: ignore[no-any-return]
    target = part.get("target")
    return target != -100 if isinstance(target, Tensor) and target.dim() == 2 else None


def _mask(term: Tensor, outputs: Outputs | None, part: Batch) -> Tensor | None:
    mask = outputs.mask if outputs is not None else None
    if mask is None and outputs is not None and outputs.target is not None:
        mask = outputs.target != -100
    if mask is None:
        mask = part.get("mask")
    if mask is None and isinstance(target := part.get("target"), Tensor) and target.shape == term.shape:
        mask = target != -100
    if mask is not None and mask.shape != term.shape:
        raise InputError("loss", f"a term {tuple(term.shape)} does not fit the mask {tuple(mask.shape)}")
    return mask.bool() if mask is not None else None


def _weighted(terms: Mapping[str, tuple[float, Tensor]]) -> Tensor:
    total: Tensor | None = None
    for weight, value in terms.values():
        part = value if weight == 1.0 else weight * value
        total = part if total is None else total + part
    assert total is not None
    return total


def _routed(value: Any, column: Tensor, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _routed(each, column, name) for key, each in value.items()}
    if value.dim() == 0:
        raise InputError("router", f"loss {name!r} gives one value a batch: a router needs one value a sample, [B]")
    return value * column.view(-1, *[1] * (value.dim() - 1))


def _named(outputs: Outputs, mapping: Mapping[str, str] | None) -> Outputs:
    """The outputs with taps under the names that a loss gave them."""
    if not mapping:
        return outputs
    extra = {name: outputs[path] for name, path in mapping.items() if name != path}
    return _replaced(outputs, extra) if extra else outputs


def _replaced(outputs: Outputs, tensors: Mapping[str, Tensor]) -> Outputs:
    return replace(outputs, tensors={**outputs.tensors, **tensors})


def _concat(parts: Mapping[str, Batch]) -> tuple[Batch, dict[str, int]]:
    """The streams as one batch, of the keys that all have."""
    keys = set.intersection(*(set(part) for part in parts.values()))
    whole = {}
    for key in keys:
        values = [part[key] for part in parts.values()]
        whole[key] = torch.cat(values) if isinstance(values[0], Tensor) else [v for part in values for v in part]
    return Batch(whole), {name: len(part) for name, part in parts.items()}


def _joined(seen: Sequence[Streams]) -> Streams:
    """The chunks' outputs put together again, detached."""
    if len(seen) == 1:
        return {name: outputs.detach() for name, outputs in seen[0].items()}
    return {name: _map_outputs([each[name].detach() for each in seen], torch.cat) for name in seen[0]}


def _map_outputs(pieces: Sequence[Outputs], join: Any) -> Outputs:
    first = pieces[0]

    def both(get: Any) -> Any:
        values = [get(piece) for piece in pieces]
        return None if values[0] is None else join(values)

    hidden = both(lambda o: o.unembed and o.unembed.hidden)
    return replace(
        first,
        logits=both(lambda o: o.logits),
        mask=both(lambda o: o.mask),
        target=both(lambda o: o.target),
        unembed=None if first.unembed is None else Unembed(hidden, *first.unembed[1:]),
        tensors={key: both(lambda o, k=key: o.tensors[k]) for key in first.tensors},
        rows=None,
    )


def _gathered(outputs: Outputs) -> Outputs:
    return _map_outputs([outputs], lambda values: parallel.gather(values[0]))


def _gathered_batch(part: Batch) -> Batch:
    return Batch({k: parallel.gather(v) if isinstance(v, Tensor) else v for k, v in part.items()})
