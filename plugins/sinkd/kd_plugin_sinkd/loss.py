"""Sinkhorn Distance Minimization for Knowledge Distillation (Cui et al.; LREC-COLING 2024, arXiv 2402.17110).

The student's distributions over a batch and the teacher's are two sets of points. What it costs to carry one
onto the other, whichever pairs with which, is the loss: an addition to cross-entropy and a sample-wise term.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import at_least_float32

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
RELEASED_TEMPERATURE, RELEASED_SCALE = 2.0, 0.001


def sinkhorn_plan(cost: Tensor, *, epsilon: Positive = 0.1, rounds: Count = 20) -> Tensor:
    """The transport plan K^(rounds) of a cost matrix [N, M]: exp(-cost / epsilon), rows then columns divided by their sums.

    The columns sum to 1 exactly, the rows nearly (for N = M). In the logarithm, so no epsilon underflows.
    Differentiable through all rounds.
    """
    log_plan = -cost / epsilon
    for _ in range(rounds):
        log_plan = log_plan.log_softmax(1).log_softmax(0)
    return log_plan.exp()


def sinkhorn_distance(p: Tensor, q: Tensor, *, epsilon: Positive = 0.1, rounds: Count = 20) -> Tensor:
    """sum_ij plan_ij W_ij with W_ij = |p_i - q_j|_1, of distributions [N, C] and [N, C]: a scalar in [0, 2N].

    It grows with N. With the entropy's bias: above 0 where p equals q, unless epsilon -> 0.
    """
    w = torch.cdist(p, q, p=1.0)
    return (sinkhorn_plan(w, epsilon=epsilon, rounds=rounds) * w).sum()


@conventions(couples_batch=True, t_squared=False)
def sinkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: Positive = 2.0,
    epsilon: Positive = 0.1,
    rounds: Count = 20,
    block: Count | None = None,
    variant: Literal["paper", "released"] = "paper",
) -> Tensor:
    """The Sinkhorn distance of softmax(s / temperature) and softmax(t / temperature), a share a row: scalar in [0, 2].

    Logits [..., C]; every row is a point, or every row where ``mask`` (bool, [...]) is true, as for tokens.
    ``block``: at most so many rows at a time, each block a transport problem of its own; the cost matrix of n
    rows has n^2 entries, and ``rounds`` copies of it are kept for the backward pass.
    ``released``: 0.001 times the sum over the rows, at temperature 2 whatever ``temperature`` says. There is no
    T^2. In float32 at least; no gradient to the teacher. 0, with a graph, where no row counts.
    """
    if variant == "released":
        temperature = RELEASED_TEMPERATURE
    rows = [
        (at_least_float32(x if mask is None else x[mask.bool()]) / temperature).softmax(-1).flatten(0, -2)
        for x in (student_logits, teacher_logits.detach())
    ]
    count = len(rows[0])
    if not count:
        return rows[0].sum()
    pairs = zip(*(x.split(block or count) for x in rows), strict=True)
    total = torch.stack([sinkhorn_distance(p, q, epsilon=epsilon, rounds=rounds) for p, q in pairs]).sum()
    return RELEASED_SCALE * total if variant == "released" else total / count
