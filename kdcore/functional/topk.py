"""Divergences where the teacher is known by its top k alone: `TopK` instead of logits.

What is unknown of the teacher's tail (all outside its top k) is its total, below its k-th probability each. The
tail is taken as near to the student's as that allows, p_j = min(c q_j, p_k): among all distributions that agree
with what is known, the one of least KL(p || q). So no gradient is made from what nobody knows, and none towards a
token that the teacher certainly finds unlikely.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from kdcore.types import Outputs, TopK

from .chunked import chunked
from .rows import at_least_float32, check

NOTHING = -80.0  # stands for log 0: no probability in float32, and finite, so that differences are 0
SINGLED_OUT = 32


def topk_rows(
    student_logits: Tensor, topk: TopK, *, temperature: float = 1.0, singled_out: int = SINGLED_OUT
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher, each ``[..., m]``: a divergence of these is that of all V classes.

    student_logits ``[..., V]``; `topk` of softmax(teacher logits / temperature), -inf where an entry is absent (its
    id then repeats another one's). The entries are the k, the student's `singled_out` largest of the tail, and
    the rest of both tails, whose ratio is constant. Computed in float32 (float64 stays); no gradient to the teacher.
    """
    z = at_least_float32(student_logits)
    z = z if temperature == 1 else z / temperature
    ids, present = topk.ids, ~topk.logp.isneginf()
    check(ids.shape[:-1] == z.shape[:-1], f"one top k per row of logits, {tuple(z.shape[:-1])}")
    check(ids.shape[-1] < z.shape[-1], f"{ids.shape[-1]} entries of {z.shape[-1]} leave no rest")
    count = min(singled_out, z.shape[-1] - ids.shape[-1] - 1)
    log_q = cast(Tensor, _Gathered.apply(z, ids, present, count))
    with torch.no_grad():
        head = topk.logp.to(z.dtype)
        cap = head.masked_fill(~present, 0.0).amin(-1, keepdim=True)
        log_tail = _capped(log_q[..., ids.shape[-1] :], topk.rest.to(z.dtype).unsqueeze(-1), cap)
        log_p = torch.cat([head, log_tail], -1)
        log_p = (log_p - log_p.logsumexp(-1, keepdim=True)).clamp_min(NOTHING)
    return log_q, log_p


class _Gathered(torch.autograd.Function):
    """Log-probabilities ``[..., k + count + 1]`` of the ids, of the largest others, and of all others together.

    Six passes over the logits, there and back. A backward pass that is to be differentiated itself is left to
    autograd.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, ids: Tensor, present: Tensor, count: int) -> Tensor:
        tail = z.scatter(-1, ids, -math.inf)
        largest = tail.topk(count, -1)
        tail.scatter_(-1, largest.indices, -math.inf)
        # beside its own largest: however far it lies below the student's head, nothing underflows
        top = tail.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)
        weights = tail.sub_(top).exp_()
        rest = weights.sum(-1, keepdim=True)
        places = torch.cat([ids, largest.indices], -1)
        live = torch.cat([present, torch.ones_like(largest.indices, dtype=torch.bool), rest > 0], -1)
        values = torch.cat([z.gather(-1, places), top + rest.log()], -1)
        whole = values.masked_fill(~live, -math.inf).logsumexp(-1, keepdim=True)
        ctx.save_for_backward(z, places, live, weights, rest, top, whole)
        return (values - whole).masked_fill_(~live, NOTHING)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, places, live, weights, rest, top, whole = ctx.saved_tensors
        upstream = upstream * live
        if torch.is_grad_enabled():
            (gradient,) = torch.autograd.grad(_gathered(z, places, live), z, upstream, create_graph=True)
            return gradient, None, None, None
        total = upstream.sum(-1, keepdim=True)
        q = (z.gather(-1, places) - whole).exp()
        least = torch.finfo(rest.dtype).tiny
        gradient = weights * (upstream[..., -1:] / rest.clamp_min(least) - total * (top - whole).exp())
        # an absent entry repeats another one's id: the normaliser's share is set once, the terms' own are added
        gradient.scatter_(-1, places, -total * q).scatter_add_(-1, places, upstream[..., :-1])
        return gradient, None, None, None


def _gathered(z: Tensor, places: Tensor, live: Tensor) -> Tensor:
    """The same in plain operators, for the derivatives of a derivative."""
    rest = z.scatter(-1, places, -math.inf).logsumexp(-1, keepdim=True)
    values = torch.cat([z.gather(-1, places), rest], -1)
    whole = values.masked_fill(~live, -math.inf).logsumexp(-1, keepdim=True)
    return (values - whole).masked_fill(~live, NOTHING)


def _capped(log_q: Tensor, rest: Tensor, cap: Tensor) -> Tensor:
    """log min(c q, cap) with c such that the sum is exp(rest). Largest q first; the last entry has no cap."""
    behind = log_q.flip(-1).logcumsumexp(-1).flip(-1)  # log of the sum of q from here on
    capped = torch.arange(log_q.shape[-1], device=log_q.device)  # if that many are at the cap,
    left = rest.exp() - capped * cap.exp()  # this is left for the others
    log_c = left.clamp_min(torch.finfo(left.dtype).tiny).log() - behind
    fits = (log_c + log_q <= cap) | (capped == log_q.shape[-1] - 1)
    return torch.minimum(log_c.gather(-1, fits.int().argmax(-1, keepdim=True)) + log_q, _but_last(cap, log_q))


def _but_last(cap: Tensor, like: Tensor) -> Tensor:
    caps = cap.expand_as(like).clone()
    caps[..., -1] = math.inf
    return caps


def from_topk(
    fn: Callable[..., Tensor], student: Outputs, topk: TopK, *, temperature: float = 1.0, **options: Any
) -> Tensor:
    """``fn(student_rows, teacher_rows, **options)`` of every row, ``[...]``: `fn` takes logits and is a divergence.

    From the student's logits, or in chunks from its hidden states. `temperature` is the one that the top k was
    taken at; where `fn` has one, pass the same number in `options` too: the rows are such that it gives it back.
    """

    def of_rows(logits: Tensor, *, ids: Tensor, logp: Tensor, rest: Tensor) -> Tensor:
        rows = topk_rows(logits, TopK(ids, logp, rest), temperature=temperature)
        return fn(*(temperature * row for row in rows), **options)

    if student.logits is not None:
        return of_rows(student.logits, **topk._asdict())
    check(student.unembed is not None, "the student gives neither logits nor hidden states")
    assert student.unembed is not None
    return chunked(of_rows, student.unembed, (), student.mask, per_token=topk._asdict())
