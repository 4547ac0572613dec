"""What holds for every kind that computes: losses, routers, students, teachers, augmentations."""

from __future__ import annotations

import hashlib
import inspect
import pickle
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from kdcore.checkpoint import load_state, save_state
from kdcore.errors import cause
from kdcore.events import events_of
from kdcore.hookspecs import EVENT_PREFIXES, EVENTS
from kdcore.testing.arguments import NAMES, find
from kdcore.testing.findings import BASICS, DECLARED, Skipped, check, fail_if, random_state, reseed, skip_if
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import copied, differing, leaves, same

COMPUTING = ("loss", "router", "student", "teacher", "augmentation")


@check(*COMPUTING, after=("imports", "kind", "schema"))
def events(s: Subject) -> None:
    """An event or argument that does not exist is never called. Do: compare with kdcore.hookspecs.RunEvents."""
    named = [n for n in dir(s.target) if n.startswith(EVENT_PREFIXES) or n in EVENTS]
    methods = {name: getattr(s.target, name) for name in named if inspect.isclass(s.target)}
    stand_in = type(s.component.name, (), methods)  # made without parameters
    events_of([(s.component.name, stand_in())])


@check(*COMPUTING, after=DECLARED)
def runs(s: Subject) -> None:
    """A component must answer in a run like the one that it is made for. Do: give the plugin a recipe that
    names it, or the component a `conformance_sample` (docs/testing.md)."""
    find(s)


@check(*COMPUTING, after=("runs", "frozen_eval"))
def determinism(s: Subject, call: Call) -> None:
    """Equal inputs give equal answers, or a run cannot be resumed or repeated. Do: draw from self.run.rng("name")
    or self.run.generator, never from a global generator or the clock."""
    before, first = _memory(s), s.answer(call)
    reseed(1)
    state, again = random_state(), s.answer(call, seed=1)
    fail_if(random_state() != state, "it draws from, or seeds, a global random generator in eval mode")
    if _memory(s) == before:  # else it is hidden_state's to say
        fail_if(differing(first, again, rel=0), "two calls with the same inputs differ")


def _memory(s: Subject) -> str:
    """A digest of what a component's function or class, and its module, hold from call to call."""
    function = getattr(s.declared, "function", type(s.declared).forward)
    cells = dict(enumerate(cell.cell_contents for cell in getattr(function, "__closure__", None) or ()))
    owners = [vars(type(s.declared)), vars(function), getattr(function, "__globals__", {}), cells]
    digest = hashlib.sha256()
    for value in [v for owner in owners for name, v in owner.items() if not str(name).startswith("__")]:
        with suppress(Exception):  # a module, a lambda: what cannot be pickled holds no numbers to compare
            digest.update(pickle.dumps(value))
    return digest.hexdigest()


@check(*COMPUTING)
def hidden_state(s: Subject, call: Call) -> None:
    """A forward that changes what later calls give makes micro-batches and guards train something else. Do: change
    state in after_step, and keep it in buffers or get_extra_state."""
    component, train = s.fresh(), s.kind != "teacher"
    before = _statistics_aside(component)
    first = s.answer(call, component, train=train)
    other = call.but(lambda _, t: t * 1.3 + 0.1 if t.is_floating_point() else t)
    for _ in range(8):  # a count of calls may matter late
        s.answer(other, component, train=train)
    changed = differing(before, _statistics_aside(component), rel=0)
    fail_if(changed, f"forward changed {', '.join(changed[:3])}")
    later = s.answer(call, component, train=train)
    fail_if(differing(first, later, rel=1e-6), "a later call with the same inputs gives another answer")
    wrote = s.kind != "student" and s.home.signature() != s.world
    fail_if(wrote, "forward wrote to the run's student or teacher, or changed its mode")


def _statistics_aside(module: Any) -> dict[str, Tensor]:
    """A module's state without the running statistics of batch norm, which torch itself moves in training."""
    norms = [name for name, each in module.named_modules() if isinstance(each, _NormBase)]
    state = {k: v for k, v in module.state_dict().items() if k.rpartition(".")[0] not in norms}
    return copied({k: v for k, v in state.items() if isinstance(v, Tensor)})


@check("loss", "router", "augmentation")
def ownership(s: Subject) -> None:
    """A run's model that is a component's child is trained and saved by it too. Do: ask it through self.run, or hold it
    in a tuple."""
    models = {"student": s.home.run.student, **{f"teacher {n}": t for n, t in s.home.run.teachers.items()}}
    mine = {id(p) for p in s.declared.parameters()}
    held = [name for name, model in models.items() if mine & {id(p) for p in model.parameters()}]
    fail_if(held, f"it holds the parameters of {', '.join(held)}")


@check(*COMPUTING)
def inputs_untouched(s: Subject, call: Call) -> None:
    """Other losses, the teacher and the metrics read the same tensors. Do: compute out of place."""
    args = copied(call.args)
    given, before = leaves(args), leaves(call.args)
    s.fresh().eval()(*args.values())
    moved = [path for path, tensor in given.items() if not same(tensor, before[path], rel=0)]
    if s.kind in NAMES:  # an augmentation may replace a batch's values
        moved += differing(args, call.args, rel=0)
    fail_if(moved, f"forward changed its input {', '.join([*dict.fromkeys(moved)][:3])}")


@check("loss", "router", "student", "teacher")
def batch_order(s: Subject, call: Call) -> None:
    """The order of a batch is random and means nothing. Do: give every sample its own term, whatever its place."""
    order = torch.arange(rows_of(s, call)).roll(1).flip(0)
    first, second = s.answer(call), s.answer(call.rows(order))
    coupled = s.kind == "loss" and s.declared.couples_batch
    for name, value in first.items():
        expected, got = value[order] if call.has_rows(value) else value, second[name]
        fail_if(
            not (same(value.sum(), got.sum()) if coupled else same(expected, got)),
            f"{name}: samples in another order give other values".lstrip(": "),
        )


@check("loss", "student", "teacher", after=(*BASICS, "batch_order"))
def sample_independence(s: Subject, call: Call) -> None:
    """A sample's value that depends on its neighbours changes with batch size, ranks and accumulation. Do: normalise
    over classes or positions, not over the batch, or declare couples_batch = True."""
    skip_if(s.kind == "loss" and s.declared.couples_batch, "declares couples_batch")
    half = rows_of(s, call) // 2

    def other_rows(path: str, tensor: Tensor) -> Tensor:
        """Other floating values in the rows from ``half`` on."""
        if not call.has_rows(tensor, path) or not tensor.is_floating_point():
            return tensor
        kept, old = tensor[:half], tensor[half:]
        return torch.cat([kept, 1.5 * old.roll(1, 0) + 0.7 * torch.linspace(-1, 1, old.numel()).view_as(old)])

    other = call.but(other_rows)
    first, second = s.answer(call), s.answer(other)
    for name, value in first.items():
        moved = call.has_rows(value) and not same(value[:half], second[name][:half])
        fail_if(moved, f"{name}: other samples of the batch change a sample's value".lstrip(": "))
    if s.kind == "loss" and any(not v.dim() for v in first.values()):
        one, two = s.gradients(call), s.gradients(other)
        near = all(same(one[path][:half], two[path][:half], 1e-3) for path in one)
        fail_if(not near, "other samples of the batch change a sample's gradient")


@check(*COMPUTING)
def state_round_trip(s: Subject) -> None:
    """What is not in the checkpoint is lost on resume. Do: register buffers, or use get_extra_state and
    set_extra_state with tensors, numbers and plain containers."""
    call, component = s.calls[0], s.fresh()
    try:
        _step(s, component, call)
    except Exception as error:  # its update needs more than a lone component has
        raise Skipped(f"its step needs a whole run: {cause(error)}") from None
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state", dict(component.state_dict()))
        again = s.home.make(s.kind, s.name, s.params)
        again.load_state_dict(load_state(Path(folder) / "state"))
    differ = differing(s.answer(call, component), s.answer(call, again), rel=1e-6)
    fail_if(differ, "after a step, a new instance with the saved state answers differently")


def _step(s: Subject, component: Any, call: Call) -> None:
    """The two events in which a loss or router may change its state."""
    if s.kind in NAMES and call.size:
        args, found = copied(call.args), events_of([(s.component.name, component)])
        batch, teachers = args["batch"], args.get("teachers", args.get("teacher"))
        said = teachers if isinstance(teachers, Mapping) else {"main": teachers}
        found.before_step(batch=batch, clean=batch)
        found.after_step(batch=batch, student=args["student"], teachers=said)


def rows_of(s: Subject, call: Call) -> int:
    """The batch size of a call whose rows can be compared one by one."""
    skip_if(call.size < 2, "its batch has several streams, or one sample")
    first = s.answer(call)
    s.home.run.seed += 1
    drawn = differing(first, s.answer(call), rel=0)
    s.home.run.seed -= 1
    skip_if(drawn, "it draws at random: its samples are alike in distribution alone")
    return call.size
