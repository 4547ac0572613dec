"""The conventions that a loss declares, tried on changed logits, labels and classes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.testing.contract import student_gradients
from kdcore.testing.findings import BASICS, Failed, Skipped, check
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import leaves, mapped
from kdcore.types import Outputs

_TEMPERATURE = re.compile(r"temperature|(^|_)(temp|tau|T)(_|$)|^t$")
Args = Mapping[str, Any]


@check("loss")
def t_squared(s: Subject) -> None:
    """Softening by T divides gradients by T squared; a loss that drops or doubles the factor is weighed otherwise than
    its recipe says. Do: multiply by temperature**2 once, or declare t_squared = False."""
    temperatures = {
        n: v for n, v in _params(s).items() if _TEMPERATURE.search(n) and isinstance(v, float | int) and v
    }
    if not temperatures:
        raise Skipped("has no temperature")
    call, declared = _with_logits(s), s.declared.t_squared
    base, (two, four) = (
        _contrast(s, call.args),
        (_contrast(s, call.args, k, temperatures) for k in (2.0, 4.0)),
    )
    if abs(_contrast(s, call.args, 2.0, temperatures, logits=False) / base - 1) < 1e-6:
        if all(name in ("tau", "t") for name in temperatures):
            raise Skipped(f"{', '.join(temperatures)} does not divide the logits")
        raise Failed("the temperature changes nothing")
    powers = [
        math.log(abs(v / base)) / math.log(k) if v and math.isfinite(v) else 0.5
        for v, k in ((two, 2), (four, 4))
    ]
    bound = abs(_contrast(s, call.args, 2.0, {n: v / 2 for n, v in temperatures.items()}) / base - 1) > 1e-3
    plain = abs(powers[0] - powers[1]) < 0.005 and abs(powers[0] - round(powers[0])) < 0.02
    if bound and plain:  # it sees logits / T alone, times a power of T
        if declared and abs(powers[0] - 2) > 0.1:
            raise Failed(f"it is scaled by T to the power {powers[0]:.1f}, and declares T squared")
        if not declared and abs(powers[0] - 2) < 0.1:
            raise Failed("it is scaled by T squared, and declares t_squared = False")
        return
    if not declared:
        raise Skipped("the temperature does more than divide the logits: no power of T to compare")
    slow, fast = (
        _contrast_gradient(s, call, k / v, temperatures)
        for v in [min(temperatures.values())]
        for k in (8, 16)
    )
    if slow > 0 and not 0.35 < fast / slow < 2.83:
        raise Failed(f"at a high temperature, doubling it multiplies the gradient by {fast / slow:.2f}")


@check("loss")
def class_count(s: Subject) -> None:
    """The sum over classes and their mean differ by the class count, silently. Do: sum over the class axis
    (reduction="none", then .sum(-1)), or declare mean_over_classes = True."""
    call, declared = _with_logits(s), s.declared.mean_over_classes
    base = _contrast(s, call.args)
    try:
        ratios = [_contrast(s, call.args, grow=n) / base for n in (1, 2)]
    except Exception as error:  # a loss may be bound to its class count
        raise Skipped(f"does not take more classes: {type(error).__name__}") from None
    mean = abs(ratios[0] - 1 / 2) < 0.01 and abs(ratios[1] - 1 / 3) < 0.01
    if mean and not declared:
        raise Failed("impossible classes added to both sides divide it: it is a mean over classes")
    if declared and not mean:
        raise Failed("declares mean_over_classes, and impossible classes do not divide it")
    if max(abs(r - 1) for r in ratios) > 0.01 and not mean:
        raise Skipped("impossible classes change it otherwise than a mean: cannot be told")


@check("loss")
def hard_term(s: Subject) -> None:
    """The core drops its own task loss where a loss holds it, and adds it where not. Do: take the cross-entropy with
    the labels out, or declare hard_term = True."""
    calls = [c for c in s.calls if c.layout in ("classes", "tokens", "dense") and _target(c) is not None]
    if not calls:
        raise Skipped("its sample has no logits with labels")
    call, declared = calls[0], s.declared.hard_term
    pairs = torch.tensor([_with_labels(s, call, draw) for draw in range(8)], dtype=torch.float64)
    values, entropies = pairs.T
    if values.std() < 1e-6 * values.abs().max().clamp_min(1e-6):
        if declared:
            raise Failed("declares hard_term, and the labels change nothing: nobody would train on them")
        return
    design = torch.stack([torch.ones(8, dtype=torch.float64), entropies], 1)
    fit = torch.linalg.lstsq(design, values.unsqueeze(1)).solution
    rest = (values - (design @ fit).squeeze(1)).std() / values.std()
    if not declared and rest < 1e-3 and fit[1] > 0:
        raise Failed(
            f"it holds {float(fit[1]):.3g} times the cross-entropy with the labels, and the core adds its own"
        )


@check("loss", after=(*BASICS, "batch_order", "sample_independence"))
def zero_at_teacher(s: Subject) -> None:
    """A divergence is 0 where student equals teacher, and positive elsewhere. Do: look for a turned sign, swapped
    arguments or two temperatures, or declare zero_at_teacher = False."""
    call, declared = s.calls[0], s.declared.zero_at_teacher
    equal = at_teacher(s, call.args)
    if equal is None:
        raise Skipped("student's and teacher's tensors have other shapes")
    away, there = s.total(call.args).item(), s.total(equal).abs().item()
    zero = there <= 1e-4 * abs(away) + 1e-6
    if declared and not zero:
        raise Failed(f"declares zero_at_teacher, and is {there:.4g} where student equals teacher")
    flat = zero and all(float(g.abs().max()) < 1e-4 for g in student_gradients(s, equal).values())
    if (declared or flat) and away < 0 and zero:
        raise Failed(f"it is {away:.4g} away from the teacher and 0 at it: its sign is turned")


@check("loss", after=(*BASICS, "zero_at_teacher"))
def direction(s: Subject) -> None:
    """A step down the gradient should bring the student's logits nearer to the teacher's. Do: look for a turned sign;
    a loss that pushes away on purpose says so in expected_failures."""
    call = _with_logits(s)
    if s.declared.hard_term:
        raise Skipped("the labels pull too")
    if (equal := at_teacher(s, call.args)) is None or s.total(equal).abs() < 1e-5:
        raise Skipped("zero_at_teacher has seen its sign")
    grads = student_gradients(s, call.args)["student/logits"]
    way = _first(call.args["teacher"]).logits - call.args["student"].logits
    way = way - way.mean(call.class_axis, keepdim=True)
    if float(F.cosine_similarity(grads.flatten(1), way.flatten(1)).mean()) > 0.3:
        raise Failed("a step down its gradient leads away from the teacher")


# ---- what the checks change ---------------------------------------------------------------------------


def _params(s: Subject) -> dict[str, Any]:
    return {n: s.params.get(n, p.default) for n, p in s.schema.params.items()}


def has_logits(args: Args) -> bool:
    student, teacher = args["student"], _first(args["teacher"])
    return all(isinstance(o, Outputs) and o.logits is not None for o in (student, teacher))


def _with_logits(s: Subject) -> Call:
    """The first call whose value depends on both sides' logits, through a contrast of two teachers."""
    for call in s.calls:
        if has_logits(call.args) and call.layout != "other":
            base = _contrast(s, call.args)
            other = mapped(call.args, lambda p, t: t * 0.5 if p == "student/logits" else t)
            if math.isfinite(base) and abs(base) > 1e-6 and _contrast(s, other) != base:
                return call
    raise Skipped("does not compare logits of student and teacher")


def _contrast(
    s: Subject,
    args: Args,
    k: float = 1.0,
    temperatures: Args | None = None,
    *,
    logits: bool = True,
    grow: int = 0,
) -> float:
    """The loss minus itself with another teacher, so that terms without the teacher cancel; ``k`` multiplies
    temperatures and logits, ``grow`` adds that many times as many impossible classes."""
    component = s.fresh(**{n: v * k for n, v in temperatures.items()}) if temperatures else None
    scaled = scaled_logits(args, k) if logits else args
    change: Callable[[Any], Any] = (
        (lambda a: mapped(a, lambda p, t: _grown(p, t, grow, args))) if grow else (lambda a: a)
    )
    return float(s.total(change(scaled), component) - s.total(change(_other_teacher(scaled)), component))


def _contrast_gradient(s: Subject, call: Call, k: float, temperatures: Args) -> float:
    component = s.fresh(**{n: v * k for n, v in temperatures.items()})
    small = scaled_logits(call.args, 0.1)
    one, two = (student_gradients(s, each, component) for each in (small, _other_teacher(small)))
    return math.sqrt(sum(float((one[path] - two[path]).square().sum()) for path in one))


def scaled_logits(args: Args, k: float) -> Any:
    return mapped(args, lambda p, t: t * k if p.endswith("/logits") else t)


def _other_teacher(args: Args) -> Any:
    axis = 1 if args["student"].logits.dim() == 4 else -1
    return mapped(args, lambda p, t: t.flip(axis) if p.startswith("teacher") and p.endswith("/logits") else t)


def _grown(path: str, tensor: Tensor, times: int, args: Args) -> Tensor:
    if not path.endswith("/logits"):
        return tensor
    axis = 1 if tensor.dim() == 4 else -1
    return torch.cat([tensor, *[torch.full_like(tensor, -1e4)] * times], axis)


def at_teacher(s: Subject, args: Args) -> Any:
    """What the loss reads of each teacher replaced by what it reads of the student; None where shapes differ."""
    found = floats(args)
    names = [w.partition(".") for w in s.declared.wants() or ("student.logits", "teacher.logits")]
    mine, theirs = ([n for side, _, n in names if side == who] for who in ("student", "teacher"))
    twins = {n: n if n in mine else m for n, m in zip(theirs, mine, strict=False)}
    pairs = {p: _twin(p, twins, found) for p in found if p.startswith("teacher/") and _of(p, theirs)}
    if not pairs or any(m is None or found[m].shape != found[p].shape for p, m in pairs.items()):
        return None
    return mapped(args, lambda p, t: found[pairs[p] or p].clone() if p in pairs else t)


def _of(path: str, names: Sequence[str]) -> str | None:
    """Which of the names a path like teacher/main/unembed/hidden belongs to."""
    return next((n for n in names if f"/{n}/" in f"{path}/"), None)


def _twin(path: str, twins: Mapping[str, str], floats: Mapping[str, Tensor]) -> str | None:
    """The student's tensor that stands for a teacher's, of the same stream where there are several."""
    name = _of(path, list(twins))
    if name is None:
        return None
    tail = f"/{path[path.index(f'/{name}') + 1 :]}".replace(f"/{name}", f"/{twins[name]}", 1)
    found = [p for p in floats if p.startswith("student/") and p.endswith(tail)]
    return next((p for p in found if set(p.removesuffix(tail).split("/")[1:]) <= set(path.split("/"))), None)


def floats(args: Args) -> dict[str, Tensor]:
    return {
        p: t for p, t in leaves(dict(args)).items() if t.is_floating_point() and not p.startswith("batch")
    }


def _target(call: Call) -> Tensor | None:
    student = call.args["student"]
    found: Tensor | None = getattr(student, "target", None)
    return call.args["batch"].get("target") if found is None else found


def _with_labels(s: Subject, call: Call, draw: int) -> tuple[float, float]:
    """The loss, and the plain cross-entropy, with other labels."""
    old, logits = _target(call), call.args["student"].logits.movedim(call.class_axis, 1)
    assert old is not None
    generator = torch.Generator().manual_seed(draw)
    new = torch.randint(logits.shape[1], old.shape, generator=generator).masked_fill(old < 0, -100)
    args = mapped(call.args, lambda p, t: new if p.endswith("/target") and t.shape == new.shape else t)
    return s.total(args).item(), F.cross_entropy(logits, new, ignore_index=-100).item()


def _first(teacher: Any) -> Any:
    return next(iter(teacher.values())) if isinstance(teacher, Mapping) and teacher else teacher
