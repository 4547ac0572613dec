"""The two stock losses: plain distillation, and the task's own loss as a term."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore.kinds import Loss, Terms
from kdcore.types import Batch, Outputs, conventions

Temperature = Annotated[float, Field(gt=0)]


@conventions(zero_at_teacher=True, topk=True)
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 4.0) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)), summed over the last axis (Hinton et al. 2015, section 2).

    Logits [..., C] of both; returns [...], one value a row. Softmax in float32; no gradient to the teacher.
    """
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


class TaskLoss(Loss):
    """The recipe's task loss as an ordinary term: its own weight, stream or place in a router's column."""

    reads = ()
    hard_term = True

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> Terms:
        terms: Terms = self.run.task_terms(student, batch)
        return terms
