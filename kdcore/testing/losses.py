"""What a loss promises: its shape, where gradient goes, and the conventions that it declares."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.testing.contract import student_gradients
from kdcore.testing.findings import BASICS, Failed, Skipped, check
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import finite, living, mapped, same, taken
from kdcore.types import Outputs

_TEMPERATURE = re.compile(r"(^|_)(temperature|temp|tau|T)$")
Args = Mapping[str, Any]


@check("loss", after=("runs",))
def term_shape(s: Subject) -> None:
    """The core reduces terms by their shape: [B], [B,L] or a scalar. Do: sum over classes, keep one value a sample
    (a position, for tokens), or return a mean over the batch."""
    for call in s.calls:
        logits = getattr(call.args["student"], "logits", None)
        if not (terms := s.answer(call)):
            raise Failed("it gives no term")
        for name, term in terms.items():
            shape, size = tuple(term.shape), call.size
            allowed = {(), (size,), *({} if logits is None else {_positions(logits)})}
            features = [t for p, t in _floats(call.args).items() if t.dim() == 3]
            allowed |= {tuple(t.shape[:2]) for t in features if call.layout != "classes"}
            if size and shape not in allowed:
                raise Failed(f"{name + ': ' if name else ''}a term {shape} for {size} samples, logits {_shape(logits)}")
            if not term.is_floating_point():
                raise Failed(f"a term of {term.dtype}")


@check("loss")
def teacher_gradient(s: Subject) -> None:
    """A teacher that takes gradient is trained by its own student. Do: detach the teacher's tensors."""
    if s.declared.grad_through:
        raise Skipped("declares grad_through")
    for call in s.calls:
        live, roots = living(call.args, "teacher")
        total = s.total(live)
        found = torch.autograd.grad(total, list(roots.values()), allow_unused=True) if total.requires_grad and roots else ()
        if bad := [path for path, g in zip(roots, found, strict=False) if g is not None and bool(g.any())]:
            raise Failed(f"gradient reaches {', '.join(bad)}")


@check("loss")
def student_gradient(s: Subject) -> None:
    """A loss without gradient at the student's outputs, or at its own parameters, trains nothing. Do: look for detach,
    argmax or no_grad on the student's side, and for parameters that nothing uses."""
    for call in s.calls:
        loss = s.fresh()
        grads = student_gradients(s, call.args, loss)
        if not any(bool(g.any()) for g in grads.values()):
            raise Failed(f"no gradient at {', '.join(grads)}")
        own = {n: p for n, p in loss.named_parameters() if p.requires_grad and loss.own_optimizer is None}
        found = torch.autograd.grad(s.total(call.args, loss), list(own.values()), allow_unused=True) if own else ()
        if unused := [n for n, g in zip(own, found, strict=False) if g is None]:
            raise Failed(f"no gradient at its parameters {', '.join(unused[:3])}")
        if not finite(grads):
            raise Failed("the gradient is not finite")


@check("loss", after=(*BASICS, "batch_order", "sample_independence"))
def mask(s: Subject) -> None:
    """Padding that counts makes a sample's loss depend on its neighbours' lengths. Do: return [B,L] and leave the mean
    to the core, or leave out positions where `mask` is false."""
    calls = [c for c in s.calls if getattr(c.args["student"], "mask", None) is not None]
    if not calls:
        raise Skipped("takes no masked positions, as far as its code, recipes and catalogue entry say")
    for call in calls:
        hidden = ~call.args["student"].mask
        other = mapped(call.args, lambda p, t, h=hidden: _noise_where(h, t))
        if not same(s.total(call.args), s.total(other)):
            raise Failed("values at masked positions change the loss")
        grads = student_gradients(s, call.args)
        if any(bool(g[hidden].any()) for g in grads.values() if g.shape[:2] == hidden.shape):
            raise Failed("masked positions take gradient")


@check("loss", after=(*BASICS, "batch_order", "sample_independence"))
def batch_mean(s: Subject) -> None:
    """A loss is a mean over samples, or the learning rate means something else at every batch size. Do: return [B],
    undivided, or a scalar mean."""
    if s.declared.couples_batch:
        raise Skipped("declares couples_batch")
    for call in s.calls:
        if not call.size:
            continue
        twice = torch.arange(call.size).repeat(2)
        first, second = s.answer(call), s.answer(taken(call.args, twice, call.size))
        for name, value in first.items():
            if not same(value[twice] if value.dim() else value, second[name]):
                raise Failed("the same samples twice give another value: it is divided by the batch, or summed over it")


@check("loss")
def t_squared(s: Subject) -> None:
    """Softening by T divides gradients by T squared; a loss that drops or doubles the factor is weighed otherwise than
    its recipe says. Do: multiply by temperature**2 once, or declare t_squared = False."""
    temperatures = {n: v for n, v in _params(s).items() if _TEMPERATURE.search(n) and isinstance(v, float | int) and v}
    if not temperatures:
        raise Skipped("has no temperature")
    call, declared = _with_logits(s), s.declared.t_squared
    base, (two, four) = _contrast(s, call.args), (_contrast(s, call.args, k, temperatures) for k in (2.0, 4.0))
    if abs(_contrast(s, call.args, 2.0, temperatures, logits=False) / base - 1) < 1e-6:
        raise Failed("the temperature changes nothing")
    powers = [math.log(abs(v / base)) / math.log(k) if v and math.isfinite(v) else math.nan for v, k in ((two, 2), (four, 4))]
    bound = abs(_contrast(s, call.args, 2.0, {n: v / 2 for n, v in temperatures.items()}) / base - 1) > 1e-3
    if bound and abs(powers[0] - powers[1]) < 0.02:  # it sees logits / T alone, times a power of T
        if declared and abs(powers[0] - 2) > 0.1:
            raise Failed(f"it is scaled by T to the power {powers[0]:.1f}, and declares T squared")
        if not declared and abs(powers[0] - 2) < 0.1:
            raise Failed("it is scaled by T squared, and declares t_squared = False")
        return
    if not declared:
        raise Skipped("the temperature does more than divide the logits: no power of T to compare")
    slow, fast = (_contrast_gradient(s, call, k / v, temperatures) for v in [min(temperatures.values())] for k in (8, 16))
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
        raise Failed(f"it holds {float(fit[1]):.3g} times the cross-entropy with the labels, and the core adds its own")


@check("loss", after=(*BASICS, "batch_order", "sample_independence"))
def zero_at_teacher(s: Subject) -> None:
    """A divergence is 0 where student equals teacher, and positive elsewhere. Do: look for a turned sign, swapped
    arguments or two temperatures, or declare zero_at_teacher = False."""
    call, declared = s.calls[0], s.declared.zero_at_teacher
    equal = _at_teacher(call.args)
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
    if (equal := _at_teacher(call.args)) is None or s.total(equal).abs() < 1e-5:
        raise Skipped("zero_at_teacher has seen its sign")
    grads = student_gradients(s, call.args)["student/logits"]
    way = _first(call.args["teacher"]).logits - call.args["student"].logits
    way = way - way.mean(call.class_axis, keepdim=True)
    if float(F.cosine_similarity(grads.flatten(1), way.flatten(1)).mean()) > 0.3:
        raise Failed("a step down its gradient leads away from the teacher")


@check("loss", after=(*BASICS, "batch_order", "sample_independence"))
def extremes(s: Subject) -> None:
    """Confident models have logits far apart, and a student may equal its teacher: one infinite value ends a run. Do:
    use log_softmax rather than log of softmax, and no square root or norm of 0."""
    for call in s.calls:
        cases = {"at student = teacher": _at_teacher(call.args)}
        if _has_logits(call.args):
            cases["with logits of ±10000"] = _scaled_logits(call.args, 5e3)
            cases["with equal logits"] = _scaled_logits(call.args, 0.0)
        if call.size and not s.declared.couples_batch:
            cases["with one sample"] = taken(call.args, torch.zeros(1, dtype=torch.int64), call.size)
        for title, args in cases.items():
            if args is not None and not (finite(s.answer(args)) and finite(student_gradients(s, args))):
                raise Failed(f"{title} the value or its gradient is not finite")


@check("loss")
def amp(s: Subject) -> None:
    """Under bf16 autocast models give bfloat16. Do: compute softmax, norms and sums in float32, and build new tensors in
    their inputs' dtype."""
    for call in s.calls:
        low = mapped(call.args, _half)
        full = mapped(low, lambda p, t: t.float() if t.dtype == torch.bfloat16 else t)
        one, two = s.total(full), s.total(low, amp=True)
        if not torch.isfinite(two) or abs(two - one) > 0.1 * abs(one) + 0.05:
            raise Failed(f"{two.item():.4g} under bf16 autocast, {one.item():.4g} in float32")


# ---- what the checks change ---------------------------------------------------------------------------


def _params(s: Subject) -> dict[str, Any]:
    return {n: s.params.get(n, p.default) for n, p in s.schema.params.items()}


def _has_logits(args: Args) -> bool:
    student, teacher = args["student"], _first(args["teacher"])
    return all(isinstance(o, Outputs) and o.logits is not None for o in (student, teacher))


def _with_logits(s: Subject) -> Call:
    """The first call whose value depends on both sides' logits, through a contrast of two teachers."""
    for call in s.calls:
        if _has_logits(call.args) and call.layout != "other":
            base = _contrast(s, call.args)
            if math.isfinite(base) and abs(base) > 1e-6:
                return call
    raise Skipped("does not compare logits of student and teacher")


def _contrast(
    s: Subject, args: Args, k: float = 1.0, temperatures: Args | None = None, *, logits: bool = True, grow: int = 0
) -> float:
    """The loss minus itself with another teacher, so that terms without the teacher cancel; ``k`` multiplies
    temperatures and logits, ``grow`` adds that many times as many impossible classes."""
    component = s.fresh(**{n: v * k for n, v in temperatures.items()}) if temperatures else None
    scaled = _scaled_logits(args, k) if logits else args
    change: Callable[[Any], Any] = (lambda a: mapped(a, lambda p, t: _grown(p, t, grow, args))) if grow else (lambda a: a)
    return float(s.total(change(scaled), component) - s.total(change(_other_teacher(scaled)), component))


def _contrast_gradient(s: Subject, call: Call, k: float, temperatures: Args) -> float:
    component = s.fresh(**{n: v * k for n, v in temperatures.items()})
    small = _scaled_logits(call.args, 0.1)
    one, two = (student_gradients(s, each, component) for each in (small, _other_teacher(small)))
    return math.sqrt(sum(float((one[path] - two[path]).square().sum()) for path in one))


def _scaled_logits(args: Args, k: float) -> Any:
    return mapped(args, lambda p, t: t * k if p.endswith("/logits") else t)


def _other_teacher(args: Args) -> Any:
    axis = 1 if args["student"].logits.dim() == 4 else -1
    return mapped(args, lambda p, t: t.flip(axis) if p.startswith("teacher") and p.endswith("/logits") else t)


def _grown(path: str, tensor: Tensor, times: int, args: Args) -> Tensor:
    if not path.endswith("/logits"):
        return tensor
    axis = 1 if tensor.dim() == 4 else -1
    return torch.cat([tensor, *[torch.full_like(tensor, -1e4)] * times], axis)


def _at_teacher(args: Args) -> Any:
    """Every teacher's tensors replaced by the student's of the same name; None where shapes differ or none is read."""
    mine = {p.removeprefix("student/"): t for p, t in _floats(args).items() if p.startswith("student/")}
    theirs = {p: t for p, t in _floats(args).items() if p.startswith("teacher/")}
    pairs = {p: next((mine[n] for n in mine if p.endswith(f"/{n}")), None) for p in theirs}
    if not pairs or any(m is None or m.shape != theirs[p].shape for p, m in pairs.items()):
        return None
    return mapped(args, lambda p, t: pairs[p].clone() if pairs.get(p) is not None else t)  # type: ignore[union-attr]


def _floats(args: Args) -> dict[str, Tensor]:
    from kdcore.testing.tensors import leaves

    return {p: t for p, t in leaves(dict(args)).items() if t.is_floating_point() and not p.startswith("batch")}


def _noise_where(hidden: Tensor, tensor: Tensor) -> Tensor:
    if tensor.shape[:2] != hidden.shape or not tensor.is_floating_point():
        return tensor
    noise = torch.linspace(-30, 30, tensor.numel()).view_as(tensor)
    return torch.where(hidden.view(*hidden.shape, *[1] * (tensor.dim() - 2)), noise, tensor)


def _half(path: str, tensor: Tensor) -> Tensor:
    model = path.startswith(("student", "teacher")) and tensor.dtype == torch.float32
    return tensor.bfloat16() if model else tensor


def _target(call: Call) -> Tensor | None:
    student = call.args["student"]
    found = getattr(student, "target", None)
    return found if found is not None else call.args["batch"].get("target")


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


def _positions(logits: Tensor) -> tuple[int, ...]:
    shape = tuple(logits.shape)
    return (shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]


def _shape(logits: Tensor | None) -> str:
    return "none" if logits is None else str(tuple(logits.shape))
