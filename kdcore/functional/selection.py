"""Which tokens count: their rows are picked before anything is computed, and the results put back in place."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .rows import at_least_float32

Reduction = Literal["none", "sum", "mean"]


class Selection:
    """The tokens with mask true and weight not 0. The others are never read, so that NaN there harms nothing."""

    def __init__(self, shape: torch.Size, mask: Tensor | None, weights: Tensor | None) -> None:
        self.shape, self.weight, self.index = shape, None, None
        given = {name: x for name, x in (("mask", mask), ("weights", weights)) if x is not None}
        for name, x in given.items():
            if x.shape != shape:
                raise ValueError(f"{name} must have one entry per token, {tuple(shape)}, given {tuple(x.shape)}")
        if given:
            live = torch.stack([x.detach() != 0 for x in given.values()]).all(0)
            self.index = live.reshape(-1).nonzero().squeeze(-1)
        if weights is not None:
            self.weight = at_least_float32(weights.reshape(-1)[self.index])

    def take(self, x: Tensor) -> Tensor:
        """The chosen rows of x ``[*shape, ...]`` as ``[M, ...]``."""
        if x.shape[: len(self.shape)] != self.shape:
            raise ValueError(f"expected one entry per token, {tuple(self.shape)}, given {tuple(x.shape)}")
        flat = x.reshape(self.shape.numel(), *x.shape[len(self.shape) :])
        return flat if self.index is None else flat.index_select(0, self.index)

    def reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        """Values ``[M]`` times their weights: in their places, others 0; their sum; or their weighted mean."""
        weighted = values if self.weight is None else values * self.weight
        if reduction == "none":
            if self.index is None:
                return weighted.reshape(self.shape)
            return weighted.new_zeros(self.shape.numel()).index_copy(0, self.index, weighted).reshape(self.shape)
        if reduction == "mean" and len(values):
            return weighted.sum() / (len(values) if self.weight is None else self.weight.sum())
        if reduction in ("sum", "mean"):
            return weighted.sum()
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', given {reduction!r}")
