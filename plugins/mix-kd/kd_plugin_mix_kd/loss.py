"""Understanding the Role of Mixup in Knowledge Distillation (Choi, Jeon, Shukla, Turaga; WACV 2023, 2211.03946).

Mixed labels and a high temperature both smooth the targets, and together too much. In place of a temperature,
every logit vector is divided by its own standard deviation, the student's and the teacher's alike.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import at_least_float32

Weight = Annotated[float, Field(ge=0)]
FLOOR = 1e-3  # of a standard deviation: a constant vector has none, and its gradient would be infinite


def rescale(logits: Tensor) -> Tensor:
    """Logits [..., C] over their standard deviation (unbiased, over the classes, in the graph), which is at least 1e-3.

    Their softmax cannot be confident: its largest value is e^r / (e^r + C - 1) with r = sqrt(C), 0.72 for 10
    classes. For C = 2 it says which class is preferred, and nothing else. Raises ValueError for one class.
    """
    if logits.shape[-1] < 2:
        raise ValueError("one class has no standard deviation over the classes")
    z = at_least_float32(logits)
    variance = (z - z.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (z.shape[-1] - 1)
    return z / variance.clamp_min(FLOOR**2).sqrt()


@conventions(hard_term=True)
def mix_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    gamma: Weight = 0.1,
    alpha: Weight = 0.9,
) -> dict[str, Tensor]:
    """gamma -sum_c y_c log q_c (``cls``) and alpha KL(p || q) (``kd``), with p, q = softmax of rescaled t, s.

    Logits [..., C] of both; ``target`` soft labels [..., C] that sum to 1, or hard ones int64 [...], where a
    negative one is ignored. Returns [...] each. It is the whole objective. There is no temperature. Unchanged
    by s -> a s + b and t -> c t + d with a, c > 0. In float32 at least; no gradient to the teacher.
    """
    log_q = F.log_softmax(rescale(student_logits), -1)
    log_p = F.log_softmax(rescale(teacher_logits.detach()), -1)
    if target.is_floating_point():
        cls = -(target.to(log_q.dtype) * log_q).sum(-1)
    else:
        cls = -log_q.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_fill(target < 0, 0.0)
    kd = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return {"cls": gamma * cls, "kd": alpha * kd}
