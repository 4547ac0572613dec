"""The divergence of all three stages, and the loss of the third with its schedule."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import Batch, Loss, Outputs

Temperature = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(gt=0, le=1)]
Epochs = Annotated[int, Field(gt=0)]


def divergence(pupil: Tensor, guide: Tensor, temperature: float = 4.0) -> Tensor:
    """D(pupil <- guide) = T^2 sum_c softmax(guide/T) (log softmax(guide/T) - log softmax(pupil/T)), with both gradients.

    Logits [B,C] or dense [B,C,H,W] of both, classes on axis 1; returns [B], the mean over positions where dense.
    """
    logits = (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in (pupil, guide))
    log_q, log_p = (F.log_softmax(z / temperature, dim=1) for z in logits)
    each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1) * temperature**2
    return each if each.dim() == 1 else each.flatten(1).mean(1)


def mst_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 4.0) -> Tensor:
    """``divergence`` without gradient to the teacher; [B], what the gate weighs."""
    return divergence(student_logits, teacher_logits.detach(), temperature)


def scheduled(epoch: int, factor: float, every: int) -> float:
    """What is left of a weight in an epoch (from 0): it is multiplied after epochs 0, every, 2 every, ...

    As the authors' code has it, so the first step down comes after the first epoch.
    """
    return float(factor ** -(-epoch // every))


class MSTLoss(Loss):
    """``mst_loss`` whose weight is multiplied by ``decay`` after the epochs 0, ``every``, 2 ``every``, ..."""

    zero_at_teacher = True

    def __init__(self, *, temperature: Temperature = 4.0, decay: Factor = 0.5, every: Epochs = 30) -> None:
        super().__init__()
        self.temperature, self.decay, self.every = temperature, decay, every

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        share = scheduled(self.run.epoch, self.decay, self.every)
        return share * mst_loss(student["logits"], teacher["logits"], temperature=self.temperature)
