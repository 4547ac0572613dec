"""What every loss promises: its terms' shape, where gradient goes, masks, means, finite values."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from kdcore.testing.contract import rows_of
from kdcore.testing.conventions import at_teacher, has_logits, scaled
from kdcore.testing.findings import BASICS, DECLARED, check, fail_if, skip_if
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import finite, gradients, leaves, noise_where, same

COMPARABLE = (*BASICS, "batch_order", "sample_independence")


@check("loss", after=(*DECLARED, "runs"))
def term_shape(s: Subject, call: Call) -> None:
    """The core reduces terms by their shape: [B], [B,L] or a scalar. Do: sum over classes, keep one value a sample
    (a position, for tokens), or return a mean over the batch."""
    terms, logits = s.answer(call), call.logits
    fail_if(not terms, "it gives no term")
    allowed: set[tuple[int, ...]] = {(), (call.size,)}
    if logits is not None:
        allowed.add(tuple(logits.select(call.class_axis, 0).shape))
    if logits is None or logits.dim() != 2:  # sequences
        said = leaves({k: v for k, v in call.args.items() if k != "batch"}).values()
        allowed |= {tuple(t.shape[:2]) for t in said if t.dim() == 3}
    given = f"for {call.size} samples, logits {'none' if logits is None else tuple(logits.shape)}"
    for name, term in terms.items():
        shape = tuple(term.shape)
        fail_if(call.size and shape not in allowed, f"{name}: a term {shape} {given}".lstrip(": "))
        fail_if(not term.is_floating_point(), f"a term of {term.dtype}")


@check("loss")
def teacher_gradient(s: Subject, call: Call) -> None:
    """A teacher that takes gradient is trained by its own student. Do: detach the teacher's tensors."""
    skip_if(s.declared.grad_through, "declares grad_through")
    bad = [path for path, grad in s.gradients(call, side="teacher").items() if bool(grad.any())]
    fail_if(bad, f"gradient reaches {', '.join(bad)}")


@check("loss", after=(*BASICS, "ownership"))
def student_gradient(s: Subject, call: Call) -> None:
    """A loss without gradient at the student's outputs, or at its own parameters, trains nothing. Do: look for detach,
    argmax or no_grad on the student's side, and for parameters that nothing uses."""
    loss = s.fresh()
    grads = s.gradients(call, loss)
    fail_if(not any(bool(g.any()) for g in grads.values()), f"no gradient at {', '.join(grads)}")
    fail_if(not finite(grads), "the gradient is not finite")
    own = {n: p for n, p in loss.named_parameters() if p.requires_grad and loss.own_optimizer is None}
    unused = [name for name, grad in gradients(s.total(call, loss), own).items() if grad is None]
    fail_if(unused, f"no gradient at its parameters {', '.join(unused[:3])}")


@check("loss", after=COMPARABLE)
def mask(s: Subject) -> None:
    """Padding that counts makes a sample's loss depend on its neighbours' lengths. Do: return [B,L] and leave the mean
    to the core, or leave out positions where `mask` is false."""
    masks = [(call, given.bool()) for call in s.calls if (given := call.aligned("mask")) is not None]
    ragged = [(call, ~given) for call, given in masks if not bool(given.all())]
    skip_if(not ragged, "takes no masked positions, as far as its code and recipes say")
    for call, hidden in ragged:
        total = s.total(call)
        other = s.total(call.but(noise_where(hidden)))
        fail_if(not same(total, other), "values at masked positions change the loss")
        with suppress(RuntimeError, ValueError, IndexError):  # it may be made for one length
            longer = s.total(_padded(call, hidden))
            fail_if(not same(total, longer), "two more masked positions change the loss")
        grads = [g for g in s.gradients(call).values() if g.shape[:2] == hidden.shape]
        fail_if(any(bool(g[hidden].any()) for g in grads), "masked positions take gradient")


def _padded(call: Call, hidden: Tensor) -> Call:
    """With two more positions that nothing counts."""

    def longer(path: str, tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != hidden.shape:
            return tensor
        fills = {"mask": False, "target": -100}
        name, more = path.rpartition("/")[2], tensor[:, :2].flip(1)
        return torch.cat([tensor, torch.full_like(more, fills[name]) if name in fills else more], 1)

    return call.but(longer)


@check("loss", after=COMPARABLE)
def batch_mean(s: Subject, call: Call) -> None:
    """A loss is a mean over samples, or the learning rate means something else at every batch size. Do: return [B],
    undivided, or a scalar mean."""
    skip_if(s.declared.couples_batch, "declares couples_batch")
    twice = torch.arange(rows_of(s, call)).repeat(2)
    second = s.answer(call.rows(twice))
    equal = [same(v[twice] if v.dim() else v, second[name]) for name, v in s.answer(call).items()]
    fail_if(
        not all(equal), "the same samples twice give another value: it divides by the batch, or sums over it"
    )


@check("loss", after=COMPARABLE)
def extremes(s: Subject, call: Call) -> None:
    """Confident models have logits far apart, and a student may equal its teacher: one infinite value ends a run. Do:
    use log_softmax rather than log of softmax, and no square root or norm of 0."""
    cases = {"at student = teacher": at_teacher(s, call)}
    if has_logits(call):
        cases |= {"with logits of ±10000": scaled(call, 5e3), "with equal logits": scaled(call, 0.0)}
    if call.size and not s.declared.couples_batch:
        cases["with one sample"] = call.rows(torch.zeros(1, dtype=torch.int64))
    for title, each in cases.items():
        fine = each is None or (finite(s.answer(each)) and finite(s.gradients(each)))
        fail_if(not fine, f"{title} the value or its gradient is not finite")


@check("loss")
def amp(s: Subject, call: Call) -> None:
    """Under bf16 autocast models give bfloat16. Do: compute softmax, norms and sums in float32, and build new tensors in
    their inputs' dtype."""

    def halved(path: str, tensor: Tensor) -> Tensor:
        return tensor if path.startswith("batch") or tensor.dtype != torch.float32 else tensor.bfloat16()

    low = call.but(halved)
    full = low.but(lambda _, t: t.float() if t.dtype == torch.bfloat16 else t)
    one, two = s.total(full), s.total(low, amp=True)
    wrong = not torch.isfinite(two) or abs(two - one) > 0.1 * abs(one) + 0.05
    fail_if(wrong, f"{two.item():.4g} under bf16 autocast, {one.item():.4g} in float32")
