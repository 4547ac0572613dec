"""TRG: Knowledge Distillation via Token-level Relationship Graph (Zhang, Liu, He; 2023, arXiv 2306.12442).

T^S [M,D_s] and T^T [M,D_t] are M = B m tokens at the same places of the same images; widths may differ. Rows are
computed in float32 (float64 stays); no gradient reaches the teacher, and none passes through a choice of neighbours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import conventions
from kdcore.functional import at_least_float32

FLOOR = 0.1  # of the tokens' root mean square length


def unit(tokens: Tensor) -> Tensor:
    """Tokens [M,D] at length 1; those shorter than FLOOR of their root mean square length keep |t| / that.

    A token of a blank place is all zeros behind a ReLU: it has no direction, and without the floor its gradient
    would be divided by its length.
    """
    t = at_least_float32(tokens)
    square = t.square().sum(-1, keepdim=True)
    floor = (FLOOR**2 * square.detach().mean()).clamp_min(torch.finfo(t.dtype).tiny)
    return t * torch.maximum(square, floor).rsqrt()


def squared_distances(tokens: Tensor) -> Tensor:
    """||T_i - T_j||^2 [M,M] of tokens [M,D]; smooth where two tokens are the same."""
    t = at_least_float32(tokens)
    t = t - t.mean(0)  # distances do not change, and small ones lose fewer digits
    square = t.square().sum(-1)
    return (square[:, None] + square[None] - 2 * t @ t.T).clamp_min(0.0)


def neighbours(distances: Tensor, k: int) -> Tensor:
    """Bool [M,M]: entry [i, j] where T_i is among the k nearest of T_j, itself left out (k at most M - 1).

    Not symmetric: i may be near to j among few, j not near to i among many.
    """
    M = len(distances)
    others = distances.detach().masked_fill(
        torch.eye(M, dtype=torch.bool, device=distances.device), torch.inf
    )
    nearest = others.topk(min(k, M - 1), dim=0, largest=False).indices
    return torch.zeros_like(others, dtype=torch.bool).scatter_(0, nearest, True)


def token_graph(tokens: Tensor, *, k: int, sigma: float = 1.0) -> Tensor:
    """A [M,M]: A_ij = exp(-||T_i - T_j||^2 / (2 sigma)) where T_i is a neighbour of T_j, else 0 (2 sigma, unsquared).

    Of unit tokens distances are at most 4. Of others they may be tens, and A all zeros.
    """
    d = squared_distances(tokens)
    return torch.where(neighbours(d, k), torch.exp(-d / (2 * sigma)), 0.0)


@conventions(couples_batch=True, zero_at_teacher=True, t_squared=False)
def local_loss(student_tokens: Tensor, teacher_tokens: Tensor, *, k: int = 8, sigma: float = 1.0) -> Tensor:
    """L_local [M]: KL(softmax_j(A^S_i.) || softmax_j(A^T_i.)) of each token i, the student's row first.

    The softmax is over the adjacency's values, zeros of non-neighbours included, so rows are nearly flat.
    """
    rows = (token_graph(t, k=k, sigma=sigma) for t in (student_tokens, teacher_tokens.detach()))
    log_s, log_t = (row.log_softmax(-1) for row in rows)
    return (log_s.exp() * (log_s - log_t)).sum(-1)


@conventions(couples_batch=True, t_squared=False)
def global_loss(student_tokens: Tensor, teacher_tokens: Tensor, *, tau: float = 1.0) -> Tensor:
    """L_global [M]: InfoNCE of student tokens, projected to the teacher's width [M,D_t], with cosine similarity.

    -log exp(sim(w T^S_i, T^T_i) / tau) / sum_j exp(sim(w T^S_i, T^T_j) / tau). Not 0 where student equals teacher.
    """
    s, t = (unit(x) for x in (student_tokens, teacher_tokens.detach()))
    similarity = s @ t.T / tau
    return F.cross_entropy(similarity, torch.arange(len(s), device=s.device), reduction="none")


def context(tokens: Tensor) -> Tensor:
    """CS [B,n,n] = softmax(F F' / sqrt(D)), row-wise, of all tokens [B,n,D] of each image."""
    f = at_least_float32(tokens)
    return (f @ f.transpose(-1, -2) / math.sqrt(f.shape[-1])).softmax(-1)


@conventions(zero_at_teacher=True, t_squared=False)
def contextual_loss(student_tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    """L_inner [B]: the mean squared difference of the two contexts, over the n^2 pairs of tokens of an image."""
    gap = context(student_tokens) - context(teacher_tokens.detach())
    return gap.square().mean((-1, -2))
