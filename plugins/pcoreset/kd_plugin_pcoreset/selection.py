"""Which unlabelled samples to buy labels for: PCoreSet (algorithm 2), and what it is compared with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import conventions

Strategy = Literal["pcoreset", "coreset", "entropy", "random", "nearest"]
CHUNK = 1024  # rows of the pool against all labelled at once


@conventions(couples_batch=True)
def distance_to_set(points: Tensor, centres: Tensor) -> Tensor:
    """min_l |p_i - c_l|_2 for each row: points [n,D], centres [m,D]; returns [n], infinite for m = 0."""
    if not len(centres):
        return points.new_full((len(points),), float("inf"))
    # the exact mode: a duplicate of a labelled point is at distance 0
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat(
        [torch.cdist(part, centres, compute_mode=exact).amin(1) for part in points.split(CHUNK)]
        or [points.new_empty(0)]
    )


def farthest_first(pool: Tensor, labelled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy k-center: ``count`` times the row of ``pool`` [n,D] that is farthest from ``labelled`` [m,D] and the picks.

    Returns the indices in order, int64 [min(count, n)], and each pick's distance when it was picked, which never
    grows. The first index of equals. One pass over the pool a pick: the distances are kept as running minima.
    """
    d, picks, far = distance_to_set(pool, labelled), [], []
    for _ in range(min(count, len(pool))):
        best = int(d.argmax())
        picks.append(best)
        far.append(d[best].clone())
        d = torch.minimum(d, torch.linalg.vector_norm(pool - pool[best], dim=1))
        d[picks] = -1.0  # none twice, not even where everything is a duplicate
    return torch.tensor(picks, dtype=torch.int64), torch.stack(far) if far else pool.new_empty(0)


def entropy(p: Tensor) -> Tensor:
    """-sum_c p log p of rows [n,C]: [n]."""
    return -torch.xlogy(p, p).sum(-1)


def select(
    strategy: Strategy,
    pool: dict[str, Tensor],
    labelled: dict[str, Tensor],
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """The rows of the pool to buy, int64 [min(count, n)]. ``p``: probabilities [.,C]; ``features`` [.,D] for coreset.

    ``pcoreset``: farthest first in the simplex, labelled samples standing where the student sees them, not at their
    labels. ``coreset``: the same in the space of unit features (equal to cosine distance). ``entropy``: the largest.
    ``nearest``: the rule reversed, nearest to the labelled set, a negative control.
    """
    p = pool["p"]
    count = min(count, len(p))
    if strategy == "random":
        return torch.randperm(len(p), generator=generator)[:count]
    if strategy == "entropy":
        return entropy(p).sort(descending=True, stable=True).indices[:count]
    if strategy == "nearest":
        return distance_to_set(p, labelled["p"]).sort(stable=True).indices[:count]
    if strategy == "coreset":
        ours, theirs = (F.normalize(side["features"], dim=1) for side in (pool, labelled))
        return farthest_first(ours, theirs, count)[0]
    return farthest_first(p, labelled["p"], count)[0]
