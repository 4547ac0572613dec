"""What every loss promises: its terms' shape, where gradient goes, masks, means, finite values."""

from __future__ import annotations

import itertools
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from kdcore.testing.contract import rows_of, student_gradients
from kdcore.testing.conventions import at_teacher, floats, has_logits, scaled_logits
from kdcore.testing.findings import BASICS, Failed, Skipped, check
from kdcore.testing.subjects import Subject
from kdcore.testing.tensors import finite, living, mapped, same, taken


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
            features = [t for p, t in floats(call.args).items() if t.dim() == 3]
            allowed |= {tuple(t.shape[:2]) for t in features if call.layout != "classes"}
            if size and shape not in allowed:
                raise Failed(
                    f"{name + ': ' if name else ''}a term {shape} for {size} samples, logits {_shape(logits)}"
                )
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
        found = (
            torch.autograd.grad(total, list(roots.values()), allow_unused=True)
            if total.requires_grad and roots
            else ()
        )
        if bad := [path for path, g in zip(roots, found, strict=False) if g is not None and bool(g.any())]:
            raise Failed(f"gradient reaches {', '.join(bad)}")


@check("loss", after=(*BASICS, "ownership"))
def student_gradient(s: Subject) -> None:
    """A loss without gradient at the student's outputs, or at its own parameters, trains nothing. Do: look for detach,
    argmax or no_grad on the student's side, and for parameters that nothing uses."""
    for call in s.calls:
        loss = s.fresh()
        grads = student_gradients(s, call.args, loss)
        if not any(bool(g.any()) for g in grads.values()):
            raise Failed(f"no gradient at {', '.join(grads)}")
        own = {n: p for n, p in loss.named_parameters() if p.requires_grad and loss.own_optimizer is None}
        total = s.total(call.args, loss)
        reached = (
            torch.autograd.grad(total, list(own.values()), allow_unused=True) if total.requires_grad else ()
        )
        if unused := [n for n, g in itertools.zip_longest(own, reached) if g is None]:
            raise Failed(f"no gradient at its parameters {', '.join(unused[:3])}")
        if not finite(grads):
            raise Failed("the gradient is not finite")


@check("loss", after=(*BASICS, "batch_order", "sample_independence"))
def mask(s: Subject) -> None:
    """Padding that counts makes a sample's loss depend on its neighbours' lengths. Do: return [B,L] and leave the mean
    to the core, or leave out positions where `mask` is false."""
    calls = [c for c in s.calls if c.mask is not None and not bool(c.mask.all())]
    if not calls:
        raise Skipped("takes no masked positions, as far as its code and recipes say")
    for call in calls:
        assert call.mask is not None
        hidden = ~call.mask.bool()
        other = mapped(call.args, partial(_noise_where, hidden))
        if not same(s.total(call.args), s.total(other)):
            raise Failed("values at masked positions change the loss")
        with suppress(RuntimeError, ValueError, IndexError):  # it may be made for one length
            if not same(s.total(call.args), s.total(mapped(call.args, partial(_padded, hidden)))):
                raise Failed("two more masked positions change the loss")
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
        rows_of(s, call)
        twice = torch.arange(call.size).repeat(2)
        first, second = s.answer(call), s.answer(taken(call.args, twice, call.size))
        for name, value in first.items():
            if not same(value[twice] if value.dim() else value, second[name]):
                raise Failed(
                    "the same samples twice give another value: it is divided by the batch, or summed over it"
                )


@check("loss", after=(*BASICS, "batch_order", "sample_independence"))
def extremes(s: Subject) -> None:
    """Confident models have logits far apart, and a student may equal its teacher: one infinite value ends a run. Do:
    use log_softmax rather than log of softmax, and no square root or norm of 0."""
    for call in s.calls:
        cases = {"at student = teacher": at_teacher(s, call.args)}
        if has_logits(call.args):
            cases["with logits of ±10000"] = scaled_logits(call.args, 5e3)
            cases["with equal logits"] = scaled_logits(call.args, 0.0)
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


def _noise_where(hidden: Tensor, path: str, tensor: Tensor) -> Tensor:
    if tensor.shape[:2] != hidden.shape or not tensor.is_floating_point():
        return tensor
    end = -30 if path.startswith("teacher") else 30
    noise = torch.linspace(-end, end, tensor.numel()).view_as(tensor)
    return torch.where(hidden.view(*hidden.shape, *[1] * (tensor.dim() - 2)), noise, tensor)


def _padded(hidden: Tensor, path: str, tensor: Tensor) -> Tensor:
    """Two more positions that nothing counts."""
    if tensor.shape[:2] != hidden.shape:
        return tensor
    if path.endswith("/mask"):
        return torch.cat([tensor, torch.zeros_like(tensor[:, :2])], 1)
    more = torch.full_like(tensor[:, :2], -100) if path.endswith("/target") else tensor[:, :2].flip(1)
    return torch.cat([tensor, more], 1)


def _half(path: str, tensor: Tensor) -> Tensor:
    model = path.startswith(("student", "teacher")) and tensor.dtype == torch.float32
    return tensor.bfloat16() if model else tensor


def _positions(logits: Tensor) -> tuple[int, ...]:
    shape = tuple(logits.shape)
    return (shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]


def _shape(logits: Tensor | None) -> str:
    return "none" if logits is None else str(tuple(logits.shape))
