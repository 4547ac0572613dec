"""The objective that the ratio balances, for loops of one's own; in a recipe the router weighs the two terms."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore.losses import kd_loss


def fused_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    *,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
) -> Tensor:
    """alpha_i tau^2 KL(sigma(z_t / tau) || sigma(z_s / tau)) + (1 - alpha_i) CE(z_s, y); [B].

    Logits [B,C], target int64 [B], alpha [B]. Gradient flows into alpha; none to the teacher.
    """
    L_KD = kd_loss(student_logits, teacher_logits, temperature=temperature)
    L_GT = F.cross_entropy(student_logits.float(), target, reduction="none")
    return alpha * L_KD + (1 - alpha) * L_GT
