"""The last layer of a language model, kept apart from its input so that the logits need never exist at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import at_least_float32


class Unembed(NamedTuple):
    """Logits that have not been computed: ``softcap(scale * (hidden @ weight.T + bias))``.

    hidden ``[..., H]``, weight ``[V, H]``, bias ``[V]``. `scale` is the model's logit scale (Cohere's `logit_scale`;
    the inverse of Granite's `logits_scaling`). `softcap` c replaces z by c tanh(z / c) (Gemma's
    `final_logit_softcapping`).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self) -> Tensor:
        """All logits ``[..., V]``, in float32 or wider; the matrix product runs under the caller's autocast."""
        return cap_and_scale(F.linear(self.hidden, self.weight, self.bias), self.softcap, self.scale)


def cap_and_scale(raw: Tensor, softcap: float | None, scale: float) -> Tensor:
    """From the output of the linear layer to logits, out of place and differentiable."""
    z = at_least_float32(raw)
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)
