"""DDK's second term (equation 3): the divergence of teacher and student on a token, at temperature T."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import forward_kl, reverse_kl


@conventions(zero_at_teacher=True, t_squared=False)
def ddk_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
) -> Tensor:
    """KL(softmax(z_T / T) || softmax(z_S / T)), or with ``reverse`` the other way round.

    Logits [B,L,V] (or [..., V]) of both; returns one value a token. The whole objective is CE + gamma * this, each a
    mean over tokens: CE is the task's own term, gamma (0.2 in the paper) the loss's weight in the recipe. No T
    squared is printed in the paper. Float32 at least, no gradient to the teacher.
    """
    divergence = forward_kl if direction == "forward" else reverse_kl
    return divergence(student_logits, teacher_logits, temperature=temperature, t_squared=False)
