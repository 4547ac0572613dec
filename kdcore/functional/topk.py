"""Divergences where the teacher is known by its top k alone: `TopK` instead of logits.

What is unknown of the teacher's tail (all outside its top k) is its total, below its k-th probability each. The
tail is taken as near to the student's as that allows, p_j = min(c q_j, p_k): among all distributions that agree
with what is known, the one of least KL(p || q). So no gradient is made from what nobody knows, and none towards a
token that the teacher certainly finds unlikely.
"""

from collections.abc import Callable
from typing import Any

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
    z = at_least_float32(student_logits) / temperature
    z = z.clamp_min(torch.finfo(z.dtype).min / 4)  # an excluded class: a gradient of 0 instead of NaN
    ids, present = topk.ids, ~topk.logp.isneginf()
    check(ids.shape[:-1] == z.shape[:-1], f"one top k per row of logits, {tuple(z.shape[:-1])}")
    check(ids.shape[-1] < z.shape[-1], f"{ids.shape[-1]} entries of {z.shape[-1]} leave no rest")
    tail = z.scatter(-1, ids, float("-inf"))
    count = min(singled_out, z.shape[-1] - ids.shape[-1] - 1)
    largest = tail.topk(count, -1)
    rest = tail.scatter(-1, largest.indices, float("-inf")).logsumexp(-1, keepdim=True)
    known = z.gather(-1, ids).masked_fill(~present, float("-inf"))
    whole = torch.cat([known, largest.values, rest], -1)
    log_q = (whole - whole.logsumexp(-1, keepdim=True)).clamp_min(NOTHING)
    with torch.no_grad():
        head = topk.logp.to(z.dtype)
        cap = head.masked_fill(~present, 0.0).amin(-1, keepdim=True)
        log_tail = _capped(log_q[..., ids.shape[-1] :], topk.rest.to(z.dtype).unsqueeze(-1), cap)
        log_p = torch.cat([head, log_tail], -1)
        log_p = (log_p - log_p.logsumexp(-1, keepdim=True)).clamp_min(NOTHING)
    return log_q, log_p


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
    caps[..., -1] = float("inf")
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
