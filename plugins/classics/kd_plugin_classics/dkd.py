"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang; CVPR 2022, arXiv 2203.08679)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import decoupled_kl

Weight = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0)]


@conventions(zero_at_teacher=True)
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: Weight = 1.0,
    beta: Weight = 8.0,
    temperature: Temperature = 4.0,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) (Eq. 7), one value a row, 0 where the label is negative (ignored).

    TCKD is the KL over {target, all others}, NCKD the KL within the others. Plain KD is alpha = 1 and
    beta = the teacher's probability of the others; the paper cuts that tie. Logits [..., C] of both, hard
    labels ``target`` int64 [...]; softmax in float32 (float64 stays); no gradient to the teacher.
    """
    return decoupled_kl(
        student_logits, teacher_logits, target=target, alpha=alpha, beta=beta, temperature=temperature
    )
