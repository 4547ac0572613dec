"""DIST: Knowledge Distillation from A Stronger Teacher (Huang, You, Wang, Qian, Xu; NeurIPS 2022, 2205.10536)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import at_least_float32

EPSILON = 1e-8  # the released code's: a row or column of equal probabilities has correlation 0, not NaN
Weight = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0)]


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - the correlation of each row of ``a`` with the same row of ``b``: [N, M] of both -> [N], in [0, 2]."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    correlation: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPSILON)
    return 1 - correlation


@conventions(couples_batch=True)
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: Weight = 1.0,
    gamma: Weight = 1.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """T^2 (beta inter + gamma intra), a scalar: Pearson distances between the tables of probabilities.

    ``inter`` is the mean over the N samples of the distance between their rows (Eq. 8), ``intra`` the mean over
    the C classes of the distance between their columns, so samples are coupled (Eq. 9). Logits [N, C] of both;
    dense outputs are brought to that form first, without the positions that do not count. Softmax in float32
    (float64 stays); no gradient to the teacher.
    """
    if student_logits.dim() != 2:
        raise ValueError(f"dist_loss takes logits [N, C], given {tuple(student_logits.shape)}")
    y_s, y_t = (
        (at_least_float32(z) / temperature).softmax(1) for z in (student_logits, teacher_logits.detach())
    )
    inter, intra = pearson_distance(y_s, y_t).mean(), pearson_distance(y_s.mT, y_t.mT).mean()
    return temperature**2 * (beta * inter + gamma * intra)
