"""The inference rule: prototype scores and image-text scores, mixed by a weight found on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

GRID = tuple(i / 20 for i in range(21))
DRAWS = 10  # the released code scores ten uniform draws
Variant = Literal["paper", "released"]


def fuse(vision: Tensor, image_text: Tensor, weight: float | Tensor) -> Tensor:
    """weight V + (1 - weight) I, logits [..., C]: 0 is the text classifier, 1 the prototype classifier."""
    return weight * vision + (1 - weight) * image_text


def accuracies(vision: Tensor, image_text: Tensor, target: Tensor, weights: Sequence[float]) -> list[float]:
    """The share of right answers at each weight: logits [N,C], labels [N]."""
    said = [fuse(vision, image_text, weight).argmax(-1) for weight in weights]
    return [(each == target).double().mean().item() for each in said]


def search(
    vision: Tensor, image_text: Tensor, target: Tensor, weights: Sequence[float] = GRID
) -> tuple[float, float]:
    """(weight, accuracy) of the best of ``weights``: logits [N,C], labels [N].

    Few held-out samples leave many weights equal: the middle one of the equals, in the order given.
    """
    found = accuracies(vision, image_text, target, weights)
    best = [weight for weight, accuracy in zip(weights, found, strict=True) if accuracy == max(found)]
    return best[len(best) // 2], max(found)


def released_search(
    vision: Tensor, image_text: Tensor, target: Tensor, generator: torch.Generator
) -> tuple[float, float]:
    """As released: ten uniform draws, the first of the best; 0.5 where nothing is right."""
    weights = torch.rand(DRAWS, generator=generator, dtype=torch.float64).tolist()
    found = accuracies(vision, image_text, target, weights)
    best = max(range(DRAWS), key=found.__getitem__)
    return (weights[best], found[best]) if found[best] > 0 else (0.5, 0.0)
