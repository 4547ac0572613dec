"""PLD: A Choice-Theoretic List-Wise Knowledge Distillation (Bassam, Zhu, Bian; NeurIPS 2025, 2506.12542).

Logits are utilities of a chooser who takes the C classes one by one, without replacement (Plackett-Luce).
The student learns to choose in the teacher's order, with the label moved to its front; each choice counts
with the teacher's probability of the class that is chosen.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import at_least_float32

Temperature = Annotated[float, Field(gt=0)]


def preference_order(teacher_logits: Tensor, target: Tensor) -> Tensor:
    """pi*: the label first, then every other class by falling teacher logit.

    ``teacher_logits`` [..., C], ``target`` int64 [...] in [0, C); returns int64 [..., C], each row a
    permutation of the classes. Classes with equal logits keep the order of their indices.
    """
    label_first = teacher_logits.scatter(-1, target.unsqueeze(-1), torch.inf)
    return label_first.argsort(dim=-1, descending=True, stable=True)


@conventions(hard_term=True, t_squared=False)
def pld_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """sum_k alpha_k (logsumexp_{l >= k} s[pi*_l] - s[pi*_k]), with alpha_k = softmax(t / temperature)[pi*_k].

    Logits [..., C] of both and hard labels ``target`` int64 [...]; returns [...], >= 0, one value a row, 0
    where the label is negative (ignored). It is the whole objective: its first step is cross-entropy times
    the teacher's confidence in the label. ``temperature`` softens the weights alone, never the student, so
    there is no temperature squared. Computed in float32 (float64 stays); no gradient to the teacher. Raises
    TypeError for soft labels (mixup, CutMix), for which the method is not defined.
    """
    if target.is_floating_point():
        raise TypeError("pld_loss needs hard labels (int64): a mixture of classes has no place in a ranking")
    s, t = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    y = target.clamp_min(0)
    order = preference_order(t, y)
    alpha = (t / temperature).softmax(-1).gather(-1, order)
    chosen = s.gather(-1, order)
    available = chosen.flip(-1).logcumsumexp(-1).flip(-1)  # from the least preferred: suffixes, not prefixes
    return (alpha * (available - chosen)).sum(-1).masked_fill(target < 0, 0.0)
