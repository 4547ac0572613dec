"""The teacher's embeddings, class by class: what the head does not read, its principal directions, the split.

h [B,D] are embeddings, W [C,D] the weight of the teacher's last linear layer (its bias plays no part).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kdcore import InputError


class Subspaces(NamedTuple):
    """Of every class: the mean embedding [C,D], S orthonormal directions [C,D,S], standard deviations along them [C,S]."""

    mean: Tensor
    directions: Tensor
    scale: Tensor


class Moments(NamedTuple):
    """Of every class: the number of samples ``size`` [C], their mean [C,D] and covariance [C,D,D], in float64."""

    size: Tensor
    mean: Tensor
    covariance: Tensor


def null_space(weight: Tensor) -> Tensor:
    """I - pinv(W) W, [D,D] in float64: the projection on what no logit depends on. Its rank is D - rank(W)."""
    W = weight.detach().double()
    row_space: Tensor = torch.linalg.pinv(W) @ W
    return torch.eye(W.shape[1], dtype=torch.float64, device=W.device) - row_space


def moments(batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Moments:
    """Of embeddings [B,D] with classes int64 [B], in one pass: D x D numbers a class are kept, not the embeddings."""
    sums: Moments | None = None  # about a point inside the data: no cancellation where the mean is large
    for h, label in batches:
        h = h.detach().double()
        if sums is None:
            shift, D = h.mean(0), h.shape[1]
            sums = Moments(h.new_zeros(classes), h.new_zeros(classes, D), h.new_zeros(classes, D, D))
        for c in label.unique().tolist():
            x = h[label == c] - shift
            for kept, new in zip(sums, (x.new_tensor(len(x)), x.sum(0), x.T @ x), strict=True):
                kept[c] += new
    if sums is None:
        raise InputError("data.source", "there is no training sample to fit subspaces on")
    n = sums.size.clamp_min(1)
    mean = sums.mean / n[:, None]
    covariance = sums.covariance / n[:, None, None] - mean[:, :, None] * mean[:, None, :]
    return Moments(sums.size, mean + shift, covariance)


def fit_subspaces(
    found: Moments, weight: Tensor | None, subclasses: int, generator: torch.Generator | None = None
) -> Subspaces:
    """The top ``subclasses`` principal directions of each class, outside the row space of ``weight`` (None: anywhere).

    With ``generator`` each class's directions are turned by a random rotation, after which no coordinate is
    expected to vary more than another; without, they are in the order of falling variance. Float32 results.
    InputError where a class has fewer directions of any variance than asked for.
    """
    P = None if weight is None else null_space(weight)
    kept = [_directions(c, found, P, subclasses, generator) for c in range(len(found.size))]
    V = torch.stack(kept)
    return Subspaces(found.mean.float(), V.float(), _deviation(found, V))


def _directions(
    c: int, found: Moments, P: Tensor | None, S: int, generator: torch.Generator | None
) -> Tensor:
    """[D,S] of one class, with a sign that does not depend on the solver."""
    whole = found.covariance[c]
    variance, vectors = torch.linalg.eigh(whole if P is None else P @ whole @ P)
    rank = int((variance > 1e-10 * whole.trace()).sum())
    if rank < S:
        where = "" if P is None else " outside what the teacher's head reads"
        problem = f"the {int(found.size[c])} embeddings of class {c} vary along {rank} directions{where}"
        hint = "fewer subclasses, or null_space = false"
        raise InputError("student.subclasses", problem, given=S, hint=hint)
    V: Tensor = vectors[:, -S:].flip(1)
    V = V if P is None else torch.linalg.qr(P @ V).Q  # W V = 0 to rounding
    V = V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return V if generator is None else V @ rotation(S, generator).to(V)


def random_subspaces(
    found: Moments, weight: Tensor | None, subclasses: int, generator: torch.Generator
) -> Subspaces:
    """A control for ``fit_subspaces``: orthonormal directions drawn at random from the same space, with their scale."""
    D = found.mean.shape[1]
    P = torch.eye(D, dtype=torch.float64) if weight is None else null_space(weight).cpu()
    drawn = torch.randn(len(found.size), D, subclasses, dtype=torch.float64, generator=generator)
    V = torch.linalg.qr(P @ drawn).Q.to(found.mean)
    return Subspaces(found.mean.float(), V.float(), _deviation(found, V))


def _deviation(found: Moments, V: Tensor) -> Tensor:
    """[C,S]: each class's standard deviation along its directions [C,D,S]."""
    return torch.einsum("cds,cde,ces->cs", V, found.covariance, V).clamp_min(0).sqrt().float()


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size,size], uniform (Haar), in float64."""
    Q, R = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    turned: Tensor = Q * R.diagonal().sign()
    return turned


def split_within(h: Tensor, found: Subspaces, *, beta: float = 1.0, standardise: bool = True) -> Tensor:
    """q(s|c) = softmax_s(a_c / beta), a_c = (h - mean_c) V_c: [B,D] to [B,C,S]; each row over s sums to 1.

    With ``standardise`` a_c is divided by its standard deviation over the class, so that ``beta`` has no unit.
    """
    h = h.detach().float()
    a = torch.einsum("bd,cds->bcs", h, found.directions) - torch.einsum(
        "cd,cds->cs", found.mean, found.directions
    )
    if standardise:
        a = a / found.scale.clamp_min(1e-12)
    return (a / beta).softmax(-1)
