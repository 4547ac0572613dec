"""How unlike two networks look on one batch. A^S, A^T: the activations before global pooling; 0 is alike.

``paper``: whole matrix over its norm, norm of the difference. ``released``: rows over their norms, mean square.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import InputError, conventions

Variant = Literal["paper", "released"]


def gram(rows: Tensor) -> Tensor:
    """F F^T of [R, ...], each row flattened: [R, R]."""
    flat = rows.flatten(1)
    return flat @ flat.T


def frobenius_distance(G_S: Tensor, G_T: Tensor) -> Tensor:
    """|| G^T / ||G^T|| - G^S / ||G^S|| ||_2, a scalar in [0, 2]."""
    mine, theirs = (F.normalize(G.flatten(), dim=0) for G in (G_S, G_T))
    distance: Tensor = torch.linalg.vector_norm(theirs - mine)
    return distance


@conventions(couples_batch=True, zero_at_teacher=True)
def relation_distance(
    student_feature: Tensor, teacher_feature: Tensor, *, variant: Variant = "released"
) -> Tensor:
    """M_r between activations [B, ...], whose other axes may differ: a scalar.

    Both compare the samples' Gram matrices G = A A^T [B, B]. ``paper``: ``frobenius_distance``; ``released``:
    m_r = sum (G^T - G^S)^2 / B^2 with rows of unit norm. Blind to rotations and positive scales of a feature.
    """
    G_S, G_T = gram(student_feature), gram(teacher_feature.detach())
    if variant == "paper":
        return frobenius_distance(G_S, G_T)
    return F.mse_loss(F.normalize(G_S), F.normalize(G_T))


@conventions(couples_batch=True, zero_at_teacher=True)
def gradient_distance(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """Released semantic distance m_s, from gradients g [N, D] of the last layer's weight: a scalar in [0, 4].

    For each class n the outer product g_n g_n^T [D, D], its rows of unit norm; the sum of squared differences
    over N D. Where no entry is 0: mean_n [2 - 2 mean_d(sign g^T_nd sign g^S_nd) cos(g^T_n, g^S_n)].
    InputError where the shapes differ, which the authors' ``view`` would fold without a word.
    """
    g_S, g_T = student_gradient, teacher_gradient.detach()
    if g_S.shape != g_T.shape:
        problem = "gradients of last layers of different shapes have no released semantic distance"
        hint = 'variant = "paper" compares class maps instead, and score = "relation" does without'
        raise InputError("variant", problem, given=f"{list(g_S.shape)} and {list(g_T.shape)}", hint=hint)
    E_S, E_T = (F.normalize(g.unsqueeze(2) @ g.unsqueeze(1), dim=2) for g in (g_S, g_T))
    return (E_T - E_S).square().sum() / g_S.numel()


def class_maps(feature: Tensor, weight: Tensor) -> Tensor:
    """Class activation maps sum_c w_nc A_c of A [B, C, ...] and the last layer's weight w [N, C]: [B, N, ...]."""
    if feature.dim() < 2 or feature.shape[1] != weight.shape[1]:
        problem = "class maps need the activations that the last layer takes the mean of, [B, C, ...]"
        raise InputError("feature", problem, given=list(feature.shape), allowed=f"C = {weight.shape[1]}")
    return torch.einsum("nc,bc...->bn...", weight, feature)


@conventions(couples_batch=True, zero_at_teacher=True)
def activation_distance(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """The paper's M_s between class maps [B, N, ...], whose places may differ: a scalar in [0, 2].

    ``frobenius_distance`` of the Gram matrices [N, N] of the classes, over samples and places.
    """
    return frobenius_distance(gram(student_maps.transpose(0, 1)), gram(teacher_maps.detach().transpose(0, 1)))
