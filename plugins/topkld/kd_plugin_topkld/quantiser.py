"""Weights rounded to a few levels: the quantiser, its straight-through gradient, and how many bits a model takes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Scheme = Literal["symmetric", "asymmetric"]
SCALE_BITS = 16


def quantise(w: Tensor, bits: int, scheme: Scheme = "symmetric", group: int | None = None) -> Tensor:
    """Q(w), of the same shape: each row (first axis), or each ``group`` of a row's entries in order, on its own scale.

    Symmetric: s * round(w / s) with s = max |w| / (2^(bits-1) - 1), levels -(2^(bits-1) - 1) to 2^(bits-1) - 1, so that
    no weight is clipped and Q(Q(w)) = Q(w); one of the 2^bits codes stays unused. Asymmetric: 2^bits levels from the
    least to the largest weight. Either way no weight moves by more than half a scale.
    """
    rows = w.reshape(len(w), -1) if group is None else w.reshape(-1, group)
    if scheme == "symmetric":
        low, span, levels = (
            torch.zeros_like(rows[:, :1]),
            rows.abs().amax(1, keepdim=True),
            2 ** (bits - 1) - 1,
        )
    else:
        low = rows.amin(1, keepdim=True)
        span, levels = rows.amax(1, keepdim=True) - low, 2**bits - 1
    s = (span / levels).clamp_min(torch.finfo(w.dtype).tiny)
    rounded: Tensor = low + s * ((rows - low) / s).round()
    return rounded.reshape(w.shape)


class FakeQuantise(nn.Module):
    """A parametrisation of a weight: Q(w) forward, the identity backward (straight-through)."""

    def __init__(self, bits: int, scheme: Scheme = "symmetric", group: int | None = None) -> None:
        super().__init__()
        self.bits, self.scheme, self.group = bits, scheme, group

    def forward(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            moved = quantise(w, self.bits, self.scheme, self.group) - w
        return w + moved

    def right_inverse(self, w: Tensor) -> Tensor:
        """A weight that is assigned becomes the master weight as it is."""
        return w

    def cost(self, w: Tensor) -> int:
        """The bits of this weight's codes and of its scales (and offsets), 16 bits each."""
        scales = len(w) if self.group is None else w.numel() // self.group
        return w.numel() * self.bits + scales * SCALE_BITS * (1 if self.scheme == "symmetric" else 2)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scheme={self.scheme}, group={self.group}"


class Cost(NamedTuple):
    """Numbers of weights and of bits."""

    weights: int
    quantised: int
    bits: int


def model_bits(model: nn.Module, rest: int = 16) -> Cost:
    """What a model's parameters take: quantised weights by their quantisers, all others ``rest`` bits each."""
    quantised = bits = 0
    for module in model.modules():
        for part in getattr(module, "parametrizations", {}).values():
            if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], FakeQuantise):
                quantised += part.original.numel()
                bits += part[0].cost(part.original)
    weights = sum(p.numel() for p in model.parameters())
    return Cost(weights, quantised, bits + rest * (weights - quantised))
