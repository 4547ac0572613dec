"""What holds for every kind that computes: losses, routers, students, teachers, augmentations."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.checkpoint import load_state, save_state
from kdcore.errors import InputError
from kdcore.events import events_of
from kdcore.testing.arguments import find
from kdcore.testing.findings import BASICS, Failed, Skipped, check
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import (
    copied,
    differing,
    leaves,
    living,
    mapped,
    memory,
    same,
    statistics_aside,
    taken,
)

COMPUTING = ("loss", "router", "student", "teacher", "augmentation")


@check(*COMPUTING, after=("kind", "schema"))
def runs(s: Subject) -> None:
    """A component must answer in a run like the one that it is made for. Do: give the plugin a recipe that
    names it, or the component a `conformance_sample` (docs/testing.md)."""
    find(s)


@check(*COMPUTING, after=("runs",))
def events(s: Subject) -> None:
    """An event or argument that does not exist is never called. Do: compare with kdcore.hookspecs.RunEvents."""
    try:
        events_of([(s.component.name, s.fresh())])
    except InputError as error:
        raise Failed(str(error)) from None


@check(*COMPUTING, after=("runs", "frozen_eval"))
def determinism(s: Subject) -> None:
    """Equal inputs give equal answers, or a run cannot be resumed or repeated. Do: draw from self.run.rng("name")
    or self.run.generator, never from a global generator or the clock."""
    for call in s.calls:
        before = memory(s.fresh())
        first, again = s.answer(call), s.answer(call, seed=1)
        if s.disturbs:
            raise Failed("it draws from, or seeds, a global random generator in eval mode")
        if differing(first, again, rel=0) and memory(s.fresh()) == before:  # else it is hidden_state's to say
            raise Failed("two calls with the same inputs differ")


@check(*COMPUTING, after=BASICS)
def hidden_state(s: Subject) -> None:
    """A forward that changes what later calls give makes micro-batches and guards train something else. Do: change
    state in after_step, and keep it in buffers or get_extra_state."""
    for call in s.calls:
        component, train = s.fresh(), s.kind != "teacher"
        before = statistics_aside(component)
        first = s.answer(call, component, train=train)
        other = mapped(call.args, lambda _, t: t * 1.3 + 0.1 if t.is_floating_point() else t)
        for _ in range(8):  # a count of calls may matter late
            s.answer(other, component, train=train)
        if changed := differing(before, statistics_aside(component), rel=0):
            raise Failed(f"forward changed {', '.join(changed[:3])}")
        if differing(first, s.answer(call, component, train=train), rel=1e-6):
            raise Failed("a later call with the same inputs gives another answer")
        if s.kind != "student" and s.home.signature() != s.world:
            raise Failed("forward wrote to the run's student or teacher, or changed its mode")


@check("loss", "router", "augmentation")
def ownership(s: Subject) -> None:
    """A run's model that is a component's child is trained and saved by it too. Do: ask it through self.run, or hold it
    in a tuple."""
    run = s.home.run
    models = {"student": run.student, **{f"teacher {name}": t for name, t in run.teachers.items()}}
    mine = {id(p) for p in s.declared.parameters()}
    if held := [name for name, model in models.items() if mine & {id(p) for p in model.parameters()}]:
        raise Failed(f"it holds the parameters of {', '.join(held)}")


@check(*COMPUTING)
def inputs_untouched(s: Subject) -> None:
    """Other losses, the teacher and the metrics read the same tensors. Do: compute out of place."""
    for call in s.calls:
        args = copied(call.args)
        tensors = leaves(args)
        s.answer(args, raw=True)
        moved = [p for p, t in tensors.items() if not _equal(t, leaves(call.args)[p])]
        if s.kind in ("loss", "router"):
            moved += [p for p in differing(args, call.args, rel=0) if p not in moved]
        if moved:
            raise Failed(f"forward changed its input {', '.join(moved[:3])}")


@check("loss", "router", "student", "teacher")
def batch_order(s: Subject) -> None:
    """The order of a batch is random and means nothing. Do: give every sample its own term, whatever its place."""
    for call in s.calls:
        order = torch.arange(rows_of(s, call)).roll(1).flip(0)
        first, second = s.answer(call), s.answer(taken(call.args, order, call.size))
        if s.kind == "loss" and s.declared.couples_batch:
            first, second = ({k: t.sum() for k, t in each.items()} for each in (first, second))
        for name, value in first.items():
            expected = value[order] if value.dim() and len(value) == call.size else value
            if not same(expected, second[name]):
                raise Failed(f"{_term(name)}the samples in another order give other values")


@check("loss", "student", "teacher", after=(*BASICS, "batch_order"))
def sample_independence(s: Subject) -> None:
    """A sample's value that depends on its neighbours changes with batch size, ranks and accumulation. Do: normalise
    over classes or positions, not over the batch, or declare couples_batch = True."""
    if s.kind == "loss" and s.declared.couples_batch:
        raise Skipped("declares couples_batch")
    for call in s.calls:
        half = rows_of(s, call) // 2
        other = mapped(call.args, partial(_changed_after, half, call.size))
        first, second = s.answer(call), s.answer(other)
        for name, value in first.items():
            if value.dim() and len(value) == call.size and not same(value[:half], second[name][:half]):
                raise Failed(f"{_term(name)}other samples of the batch change a sample's value")
        if s.kind == "loss" and any(not v.dim() for v in first.values()):
            _gradients_independent(s, call.args, other, half)


def _gradients_independent(s: Subject, args: Mapping[str, Any], other: Mapping[str, Any], half: int) -> None:
    one, two = (student_gradients(s, each) for each in (args, other))
    if not all(same(one[path][:half], two[path][:half], 1e-3) for path in one):
        raise Failed("other samples of the batch change a sample's gradient")


def student_gradients(s: Subject, args: Mapping[str, Any], component: Any = None) -> dict[str, Tensor]:
    """The gradient of the reduced loss at the student's outputs, by path; zeros where it does not arrive."""
    live, roots = living(args, "student")
    total = s.total(live, component)
    if not total.requires_grad:
        return {path: torch.zeros_like(root) for path, root in roots.items()}
    grads = torch.autograd.grad(total, list(roots.values()), allow_unused=True)
    return {
        p: torch.zeros_like(r) if g is None else g for (p, r), g in zip(roots.items(), grads, strict=True)
    }


@check(*COMPUTING)
def state_round_trip(s: Subject) -> None:
    """What is not in the checkpoint is lost on resume. Do: register buffers, or use get_extra_state and
    set_extra_state with tensors, numbers and plain containers."""
    call, component = s.calls[0], s.fresh()
    try:
        _step(s, component, call)
    except Exception as error:  # its update needs more than a lone component has
        raise Skipped(f"its step needs a whole run: {type(error).__name__}: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state", dict(component.state_dict()))
        again = s.home.make(s.kind, s.name, s.params)
        again.load_state_dict(load_state(Path(folder) / "state"))
    if differing(s.answer(call, component), s.answer(call, again), rel=1e-6):
        raise Failed("after a step, a new instance with the saved state answers differently")


def _step(s: Subject, component: Any, call: Call) -> None:
    """The two events in which a loss or router may change its state."""
    if s.kind not in ("loss", "router") or call.size == 0:
        return
    args = copied(call.args)
    teachers = args.get("teachers", args.get("teacher"))
    said = teachers if isinstance(teachers, Mapping) else {"main": teachers}
    found = events_of([(s.component.name, component)])
    found.before_step(batch=args["batch"], clean=args["batch"])
    found.after_step(batch=args["batch"], student=args["student"], teachers=said)


def _changed_after(half: int, size: int, path: str, tensor: Tensor) -> Tensor:
    """Other floating values in the rows from ``half`` on."""
    rows = tensor.dim() and len(tensor) == size and not path.endswith(("/weight", "/bias"))
    if not rows or not tensor.is_floating_point():
        return tensor
    new = tensor.clone()
    new[half:] = 1.5 * tensor[half:].roll(1, 0) + 0.7 * torch.linspace(-1, 1, tensor[half:].numel()).view_as(
        tensor[half:]
    )
    return new


def rows_of(s: Subject, call: Call) -> int:
    """The batch size of a call whose rows can be compared one by one."""
    if call.size < 2:
        raise Skipped("its batch has several streams, or one sample")
    run = s.home.run
    said = s.answer(call)
    run.seed += 1
    try:
        if differing(said, s.answer(call), rel=0):
            raise Skipped("it draws at random: its samples are alike in distribution alone")
    finally:
        run.seed -= 1
    return call.size


def _term(name: str) -> str:
    return f"{name}: " if name else ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
