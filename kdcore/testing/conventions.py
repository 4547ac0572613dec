"""The conventions that a loss declares, tried on changed logits, labels and classes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.errors import KDError
from kdcore.testing.findings import BASICS, Failed, Skipped, check, fail_if, skip_if
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import NATIVE, Change, leaves
from kdcore.types import Outputs

_TEMPERATURE = re.compile(r"temperature|(^|_)(temp|tau|T)(_|$)|^t$")
_TEACHER = r"teacher(/.*)?/logits$"


@check("loss")
def t_squared(s: Subject) -> None:
    """Softening by T divides gradients by T squared; a loss that drops or doubles the factor is weighed otherwise than
    its recipe says. Do: multiply by temperature**2 once, or declare t_squared = False."""
    values = {n: s.params.get(n, p.default) for n, p in s.schema.params.items() if _TEMPERATURE.search(n)}
    warm = {name: value for name, value in values.items() if isinstance(value, float | int) and value}
    skip_if(not warm, "has no temperature")
    call, declared = _of_logits(s), s.declared.t_squared
    base = _contrast(s, call)

    def changed(logits: float, temperature: float) -> float:
        """The contrast with both multiplied, as a multiple of itself."""
        component = s.fresh(**{name: value * temperature for name, value in warm.items()})
        return _contrast(s, scaled(call, logits), component=component) / base

    if abs(changed(1, 2) - 1) < 1e-6:
        symbols = all(name in ("tau", "t") for name in warm)
        skip_if(symbols, f"{', '.join(warm)} does not divide the logits")
        raise Failed("the temperature changes nothing")
    power, other = (math.log(abs(changed(k, k)) or math.nan, k) for k in (2, 4))
    power_of_t = abs(power - other) < 0.005 and abs(power - round(power)) < 0.02
    plain = abs(changed(2, 1) - 1) > 1e-3 and power_of_t  # it sees logits / T alone, times a power of T
    skip_if(not plain, "the temperature does more than divide the logits: no power of T to compare")
    is_two = abs(power - 2) < 0.1
    fail_if(declared and not is_two, f"scaled by T to the power {power:.1f}, and declares T squared")
    fail_if(not declared and is_two, "scaled by T squared, and declares t_squared = False")


@check("loss")
def class_count(s: Subject) -> None:
    """The sum over classes and their mean differ by the class count, silently. Do: sum over the class axis
    (reduction="none", then .sum(-1)), or declare mean_over_classes = True."""
    call, declared = _of_logits(s), s.declared.mean_over_classes
    base = _contrast(s, call)

    def grown(times: int, path: str, tensor: Tensor) -> Tensor:
        """As many impossible classes as there are, that many times."""
        more = [torch.full_like(tensor, -1e4)] * times
        return torch.cat([tensor, *more], call.class_axis) if path.endswith("/logits") else tensor

    try:
        once, again = (_contrast(s, call, partial(grown, times)) / base for times in (1, 2))
    except Exception as error:  # a loss may be bound to its class count
        raise Skipped(f"does not take more classes: {type(error).__name__}") from None
    sum_, mean = (max(abs(once - a), abs(again - b)) < 0.01 for a, b in ((1, 1), (1 / 2, 1 / 3)))
    fail_if(mean and not declared, "impossible classes added to both sides divide it: a mean over classes")
    fail_if(declared and not mean, "declares mean_over_classes, and impossible classes do not divide it")
    skip_if(not sum_ and not mean, "impossible classes change it otherwise than a mean: cannot be told")


@check("loss")
def hard_term(s: Subject, call: Call) -> None:
    """The core drops its own task loss where a loss holds it, and adds it where not. Do: take the cross-entropy with
    the labels out, or declare hard_term = True."""
    target, logits = call.aligned("target"), call.logits
    if target is None or logits is None:
        raise Skipped("its sample has no logits with labels")
    values, entropies = [], []
    for draw in range(8):
        generator = torch.Generator().manual_seed(draw)
        labels = torch.randint(logits.shape[call.class_axis], target.shape, generator=generator)
        labels = labels.masked_fill(target < 0, -100)
        entropies.append(F.cross_entropy(logits.movedim(call.class_axis, 1), labels).item())
        values.append(s.total(call.but(partial(_relabelled, labels))).item())
    idle = max(values) - min(values) <= 1e-6 * max(map(abs, values)) + 1e-12
    fail_if(idle and s.declared.hard_term, "declares hard_term, and the labels change nothing")
    if not idle and not s.declared.hard_term:
        line = scipy.stats.linregress(entropies, values)
        holds = line.slope > 0 and line.rvalue > 1 - 5e-7  # labels act through the cross-entropy alone
        fail_if(holds, f"it holds {line.slope:.3g} times the cross-entropy that the core adds, too")


def _relabelled(labels: Tensor, path: str, tensor: Tensor) -> Tensor:
    return labels if path.endswith("/target") and tensor.shape == labels.shape else tensor


@check("loss", after=(*BASICS, "batch_order", "sample_independence"))
def zero_at_teacher(s: Subject, call: Call) -> None:
    """A divergence is 0 where student equals teacher, and positive elsewhere. Do: look for a turned sign, swapped
    arguments or two temperatures, or declare zero_at_teacher = False."""
    equal, declared = at_teacher(s, call), s.declared.zero_at_teacher
    if equal is None:
        raise Skipped("student's and teacher's tensors have other shapes")
    away, there = s.total(call).item(), s.total(equal).abs().item()
    zero = there <= 1e-4 * abs(away) + 1e-6
    fail_if(declared and not zero, f"declares zero_at_teacher, and is {there:.4g} at the teacher")
    if zero and away < 0:
        flat = all(float(g.abs().max()) < 1e-4 for g in s.gradients(equal).values())
        fail_if(declared or flat, f"it is {away:.4g} away from the teacher and 0 at it: its sign is turned")


@check("loss", after=(*BASICS, "zero_at_teacher"))
def direction(s: Subject) -> None:
    """A step down the gradient should bring the student's logits nearer to the teacher's. Do: look for a turned sign;
    a loss that pushes away on purpose says so in expected_failures."""
    call = _of_logits(s)
    skip_if(s.declared.hard_term, "the labels pull too")
    equal = at_teacher(s, call)
    if equal is None or s.total(equal).abs() < 1e-5:
        raise Skipped("zero_at_teacher has seen its sign")
    teacher = next(t for path, t in leaves(call.args).items() if re.match(_TEACHER, path))
    way = teacher - call.args["student"].logits
    way = way - way.mean(call.class_axis, keepdim=True)
    down = s.gradients(call)["student/logits"]
    away = float(F.cosine_similarity(down.flatten(1), way.flatten(1)).mean()) > 0.3
    fail_if(away, "a step down its gradient leads away from the teacher")


# ---- what the checks change ---------------------------------------------------------------------------


def has_logits(call: Call) -> bool:
    teacher = call.args["teacher"]
    first = next(iter(teacher.values()), None) if isinstance(teacher, Mapping) else teacher
    return all(isinstance(o, Outputs) and o.logits is not None for o in (call.args["student"], first))


def scaled(call: Call, k: float) -> Call:
    return call.but(lambda path, t: t * k if path.endswith("/logits") else t)


def _of_logits(s: Subject) -> Call:
    """The first call whose value depends on both sides' logits, through a contrast of two teachers."""
    for call in filter(has_logits, s.calls):
        base = _contrast(s, call)
        other = _contrast(s, call, lambda path, t: t * 0.5 if path == "student/logits" else t)
        if math.isfinite(base) and abs(base) > 1e-6 and other != base:
            return call
    raise Skipped("does not compare logits of student and teacher")


def _contrast(s: Subject, call: Call, change: Change = lambda _, t: t, component: Any = None) -> float:
    """The changed loss minus itself with another teacher, so that terms without the teacher cancel."""

    def flipped(path: str, tensor: Tensor) -> Tensor:
        return tensor.flip(call.class_axis) if re.match(_TEACHER, path) else tensor

    one, two = (s.total(each.but(change), component) for each in (call, call.but(flipped)))
    return float(one - two)


def at_teacher(s: Subject, call: Call) -> Call | None:
    """What the loss reads of each teacher replaced by what it reads of the student; None where shapes differ."""
    names = [w.partition(".") for w in s.declared.wants() or ("student.logits", "teacher.logits")]
    mine, theirs = ([n for side, _, n in names if side == who] for who in ("student", "teacher"))
    pairs = [(n, n if n in mine else m) for n, m in zip(theirs, mine, strict=False)]
    try:
        return Call({**call.args, "teacher": _twin(call.args["teacher"], call.args["student"], pairs)})
    except (LookupError, KDError):  # shapes, or a name that is not there
        return None


def _twin(teacher: Any, student: Any, pairs: Sequence[tuple[str, str]]) -> Any:
    """The teacher with the student's tensors, of the same stream; LookupError where shapes differ."""
    if isinstance(teacher, Mapping):
        streams = student if isinstance(student, Mapping) else {}
        return {name: _twin(each, streams.get(name, student), pairs) for name, each in teacher.items()}
    if not pairs or teacher is None:
        raise LookupError
    native: dict[str, Any] = {}
    tensors = dict(teacher.tensors)
    for theirs, mine in pairs:
        old, new = (leaves(each) for each in (teacher[theirs], student[mine]))
        if {p: t.shape for p, t in old.items()} != {p: t.shape for p, t in new.items()}:
            raise LookupError
        (native if theirs in NATIVE else tensors)[theirs] = student[mine]
    return replace(teacher, **native, tensors=tensors)
