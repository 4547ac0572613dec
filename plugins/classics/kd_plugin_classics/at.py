"""Attention transfer (Zagoruyko, Komodakis; ICLR 2017, arXiv 1612.03928): the activation-based form."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import at_least_float32

Power = Annotated[float, Field(gt=0)]


def attention_map(feature: Tensor, power: Power = 2.0) -> Tensor:
    """Q / ||Q||_2 with Q = sum_c |A_c|^power: where a feature map is active.

    ``feature`` [B, C, H, W]; returns [B, H * W], rows of length 1 (or all zero where the map is).
    """
    return F.normalize(at_least_float32(feature).abs().pow(power).sum(1).flatten(1))


@conventions(zero_at_teacher=True)
def at_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    power: Power = 2.0,
    variant: Literal["paper", "released"] = "paper",
) -> Tensor:
    """The distance between the two attention maps, one value a sample: [B], from maps [B, C, H, W] of both.

    ``paper``: ||Q_S - Q_T||_2 / 2 (Eq. 2), divided by the number of positions, so that the recipe's ``weight``
    is the paper's 10^3. ``released``: the squared differences, averaged over the positions.
    Channels may differ; the larger map is average-pooled to the smaller. One pair of layers; the papers' sum over
    several is one [[loss]] each. No gradient to the teacher.
    """
    student, teacher = _same_size(student_feature, teacher_feature.detach())
    difference = attention_map(student, power) - attention_map(teacher, power)
    if variant == "released":
        return difference.square().mean(1)
    distance: Tensor = difference.norm(dim=1)
    return distance / 2 / difference.shape[1]


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The larger map (by height) pooled to the size of the smaller."""
    mine, theirs = ((x.shape[2], x.shape[3]) for x in (student, teacher))
    if mine > theirs:
        return F.adaptive_avg_pool2d(student, theirs), teacher
    return student, F.adaptive_avg_pool2d(teacher, mine) if mine < theirs else teacher
