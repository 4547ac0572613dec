"""The step of ``distill``: what one optimiser update does.

batch -> augment -> before_step -> terms of each micro-batch (``kdcore.terms``) -> backward -> gradients summed over
ranks -> merge -> optimisers -> after_step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcore import parallel
from kdcore.context import RunContext
from kdcore.counts import Counts
from kdcore.events import events_of
from kdcore.guards import Guards
from kdcore.kinds import Kind
from kdcore.parts import Parts
from kdcore.streams import joined
from kdcore.terms import Heard, Objective, Pass, by_stream, whole_batch
from kdcore.types import Batch, Outputs

Gradients = list[Tensor | None]


class Distiller(Objective):
    """The objective with what minimises it; ``train_step`` is one optimiser update."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.guards = Guards()
        self.events: Any = None
        self._merger: Any = None

    def attach(self, run: RunContext) -> None:
        """Give every component its ``run`` and make the events' manager."""
        self.run = run
        found = self.parts.components()
        for _, component in found:
            component.run = run
        self.events = events_of(found)
        self.grad_through = any(c.grad_through for _, c in found)
        self._merger = next((c for _, c in found if hasattr(c, "merge")), None)

    def name_of(self, component: Kind) -> str:
        return next(name for name, each in self.parts.components() if each is component)

    def train_step(self, data: Batch, optim_wrapper: Any) -> dict[str, Tensor]:
        """One optimiser update on a (rank's share of a) global batch; returns the terms' values."""
        run = self.run
        run.reseed("step", run.step, shared=False)
        clean = data.to(run.device)
        batch = clean.copy()
        for augmentation in self.parts.augmentations.values():
            batch = augmentation(batch)
        self.events.before_step(batch=batch, clean=clean)
        self.guards.witness(batch, self.student, self.teachers, run.step)
        chunks = batch.chunks(self.accumulate)
        alone = len(chunks) == 1 and parallel.world() == 1
        view = self.parts.views.get("student")
        counts = Counts() if alone else Counts.of(batch, self.student, run.device, view)
        grads: dict[str, Gradients] = {}
        passes = [self._backward(chunk, counts, optim_wrapper, grads) for chunk in chunks]
        parallel.average_gradients(self._trained(optim_wrapper), mean=False)
        if self._merger is not None:
            self._merge(grads)
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        run.terms = _values(passes)
        run.step += 1
        self._after(batch, passes)
        return run.terms

    def _backward(
        self, chunk: Batch, counts: Counts, optim_wrapper: Any, grads: dict[str, Gradients]
    ) -> Pass:
        """One micro-batch: its gradients are added to the parameters', and by term to ``grads`` for a merger."""
        with optim_wrapper.optim_context(self):
            now = self.hear(chunk, counts)
        self._look(now)
        if self._merger is not None:
            params = self._students()
            for name, (weight, value) in now.terms.items():
                if value.requires_grad:
                    fresh = torch.autograd.grad(weight * value, params, retain_graph=True, allow_unused=True)
                    pairs = zip(grads.get(name, [None] * len(params)), fresh, strict=True)
                    grads[name] = [_added(*pair) for pair in pairs]
        optim_wrapper.backward(now.objective())
        return now

    def _look(self, now: Pass) -> None:
        said = [each.student for each in now.heard.values()]
        self.guards.look(now.terms, said, self.run.step, lambda: self.culprit(now))

    def _trained(self, optim_wrapper: Any) -> list[nn.Parameter]:
        return [p for group in optim_wrapper.optimizer.param_groups for p in group["params"]]

    def _merge(self, grads: dict[str, Gradients]) -> None:
        """Put what the merger makes of the terms' gradients (global batch) in the place of their sum."""
        params = self._students()
        for each in grads.values():
            for param, grad in zip(params, each, strict=True):
                param.grad = grad
            parallel.average_gradients(params, mean=False)
            each[:] = [param.grad for param in params]
        for param, grad in zip(params, self._merger.merge(grads), strict=True):
            param.grad = grad

    def _students(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def _after(self, batch: Batch, passes: Sequence[Pass]) -> None:
        if not self.events.after_step.get_hookimpls():
            return
        heard = [_whole([each.heard[s] for each in passes], batch.part(s)) for s in passes[0].heard]
        if parallel.world() > 1 and self.router is None:  # every rank's state sees the global batch
            heard = [each.gathered() for each in heard]
        student, teachers = by_stream(heard) if batch.parts else (heard[0].student, heard[0].teachers)
        self.events.after_step(batch=whole_batch(heard, batch), student=student, teachers=teachers)


def _whole(pieces: Sequence[Heard], batch: Batch) -> Heard:
    """A stream of the whole batch from its micro-batches, detached; ``rows`` count from its start."""
    teachers: dict[str, list[Outputs]] = {}
    start = 0
    for piece in pieces:
        for name, said in piece.teachers.items():
            rows = None if said.rows is None else said.rows + start
            teachers.setdefault(name, []).append(replace(said, rows=rows))
        start += len(piece.batch)
    student = joined([piece.student for piece in pieces])
    return Heard(pieces[0].stream, batch, student, {name: joined(said) for name, said in teachers.items()})


def _added(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one + two


def _values(passes: Sequence[Pass]) -> dict[str, Tensor]:
    """Each term's value, detached: the sum over the micro-batches."""
    found: dict[str, Tensor] = {}
    for now in passes:
        for name, (_, value) in now.terms.items():
            found[name] = found.get(name, 0) + value.detach()
    return found
