"""MaKD: Multi-aspect Knowledge Distillation with Large Language Model (Lee, Bang, Kwon, Kim; 2025, 2501.13341).

Q yes/no questions are asked of every training image. p_iq, the probability of "yes" to question q about image i,
is what the q-th extra output of the student's classifier learns; the class outputs learn the label.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import Batch, Outputs, conventions
from kdcore.functional import at_least_float32


def yes_probability(logits: Tensor) -> Tensor:
    """p = softmax([l_yes, l_no])_yes = sigmoid(l_yes - l_no): ``logits`` [..., 2] of yes and no -> [...] in [0, 1]."""
    l_yes, l_no = at_least_float32(logits).unbind(-1)
    return torch.sigmoid(l_yes - l_no)


@conventions()
def makd_loss(student_aspects: Tensor, aspects: Tensor) -> Tensor:
    """[B]: mean over the Q questions of BCE(sigmoid(z_a), p). Its least value is p's mean binary entropy, not 0.

    ``student_aspects`` z_a [B,Q], the extra outputs before any sigmoid; ``aspects`` p [B,Q] in [0, 1], a value of
    the batch. No temperature. The mean over Q means that asking every question twice changes nothing. No gradient
    to p; d/dz_a of the mean over the batch is (sigmoid(z_a) - p) / (B Q). Computed in float32.
    """
    z_a = at_least_float32(student_aspects)
    p = aspects.detach().to(z_a.dtype)
    return F.binary_cross_entropy_with_logits(z_a, p, reduction="none").mean(-1)


def released_correct(logits: Tensor, aspects: Tensor, target: Tensor) -> Tensor:
    """Bool [B]: right as the released evaluation counts it, where the largest of all C + Q outputs must be the label's.

    It forgets to cut the aspect outputs off, so one of them can win. Equal outputs go to the class.
    """
    return torch.cat([logits, aspects], -1).argmax(-1) == target


def _sample() -> dict[str, Any]:
    """What the conformance check calls the loss with: 8 samples, 5 questions."""
    rng = torch.Generator().manual_seed(0)
    z_a, p = 2 * torch.randn(8, 5, generator=rng), torch.rand(8, 5, generator=rng)
    batch = Batch({"id": torch.arange(8), "aspects": p})
    return {"student": Outputs(tensors={"aspects": z_a}), "teacher": None, "batch": batch}


makd_loss.conformance_sample = _sample  # type: ignore[attr-defined]
