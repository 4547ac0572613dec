"""The last layer of a language model, kept apart from its input so that all its logits need never exist."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import at_least_float32


class Unembed(NamedTuple):
    """Logits not computed yet, ``softcap(scale * (hidden @ weight.T + bias))``, with softcap(z) = c tanh(z / c).

    hidden ``[..., H]``, weight ``[V, H]``, bias ``[V]``; `scale` is Cohere's `logit_scale` (1 / `logits_scaling` of
    Granite), `softcap` Gemma's `final_logit_softcapping`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self) -> Tensor:
        """All of them, ``[..., V]``, in float32 or wider; the matrix product runs under the caller's autocast."""
        return cap_and_scale(F.linear(self.hidden, self.weight, self.bias), self.softcap, self.scale)


def cap_and_scale(raw: Tensor, softcap: float | None, scale: float) -> Tensor:
    """From the output of the linear layer to logits; out of place and differentiable."""
    z = at_least_float32(raw) if scale == 1.0 else at_least_float32(raw) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)
