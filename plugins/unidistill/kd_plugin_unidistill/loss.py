"""UniDistill's three losses (Zhou et al., CVPR 2023), as functions on maps and boxes.

Maps [B, C, H, W], boxes [B, M, 8 or more] and ``area`` as in ``geometry``. Every loss is one number for the
batch, divided by its boxes or by its mask, so samples with more boxes weigh more. ``variant``: "paper" reads
the maps at the boxes; "released" as the authors' code does, at their mirror points, with one box at the
origin in every sample that has none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kd_plugin_unidistill.geometry import Area, box_mask, nine_points, present, sample
from kdcore import conventions

Variant = Literal["paper", "released"]
EPSILON = 1e-4
TEMPERATURE = 2.0  # of the teacher alone, in the released code


@conventions(couples_batch=True, zero_at_teacher=True)
def feature_loss(
    student_low: Tensor,
    teacher_low: Tensor,
    boxes: Tensor,
    *,
    area: Area,
    teacher_area: Area | None = None,
    variant: Variant = "paper",
) -> Tensor:
    """Equation 3: mean over nine points and channels of |F_s(p) - F_t(p)|, averaged over the boxes.

    F are the maps before the BEV encoder, with equal channels; their resolutions may differ.
    """
    f_s, f_t = _sampled(student_low, teacher_low, boxes, area, teacher_area, variant)
    return _over_boxes((f_s - f_t).abs().mean((-1, -2)), boxes, variant)


@conventions(couples_batch=True, zero_at_teacher=True)
def relation_loss(
    student_high: Tensor,
    teacher_high: Tensor,
    boxes: Tensor,
    *,
    area: Area,
    teacher_area: Area | None = None,
    variant: Variant = "paper",
) -> Tensor:
    """Equations 4 and 5: mean of |R_s - R_t|, R [9, 9] the cosines among the points' features after the encoder.

    Channels may differ.
    """
    f_s, f_t = _sampled(student_high, teacher_high, boxes, area, teacher_area, variant)
    return _over_boxes((_relations(f_s) - _relations(f_t)).abs().mean((-1, -2)), boxes, variant)


@conventions(couples_batch=True)
def response_loss(
    student_heatmap: Tensor,
    teacher_heatmap: Tensor,
    boxes: Tensor,
    student_regression: Tensor,
    teacher_regression: Tensor,
    *,
    area: Area,
    clamp: float = 1e-4,
) -> dict[str, Tensor]:
    """Equations 6 and 7: ``cls`` and ``reg``, both averaged with the mask of the boxes' centres.

    Heat maps are logits of all classes: the largest class probabilities are compared, the teacher's at
    temperature 2 (so ``cls`` is not 0 at equal logits). Regressions are compared channel by channel.
    """
    mask = box_mask(boxes, area, _size(student_heatmap))
    cls = class_gap(student_heatmap, teacher_heatmap, clamp)
    reg = (_wide(student_regression) - _wide(teacher_regression)).abs().mean(1)
    return {"cls": weighted(cls, mask), "reg": weighted(reg, mask)}


def class_gap(student_heatmap: Tensor, teacher_heatmap: Tensor, clamp: float = 1e-4) -> Tensor:
    """[B, H, W]: |max_c sigmoid(z_s) - max_c sigmoid(z_t / 2)|, probabilities clamped to [clamp, 1 - clamp]."""
    p_s = _wide(student_heatmap).sigmoid().clamp(clamp, 1 - clamp).amax(1)
    p_t = (_wide(teacher_heatmap) / TEMPERATURE).sigmoid().clamp(clamp, 1 - clamp).amax(1)
    return (p_s - p_t).abs()


def weighted(gap: Tensor, mask: Tensor) -> Tensor:
    """The mask's mean of a gap, both [B, H, W]."""
    return (mask * gap).sum() / (mask.sum() + EPSILON)


def _sampled(
    student: Tensor, teacher: Tensor, boxes: Tensor, area: Area, theirs: Area | None, variant: Variant
) -> tuple[Tensor, Tensor]:
    """Both maps at the nine points, [B, M, 9, C]."""
    here = torch.where(present(boxes).unsqueeze(-1), boxes, 0.0)
    points, swapped = nine_points(here), variant == "released"
    return (
        sample(student, points, area, swapped=swapped),
        sample(teacher, points, theirs or area, swapped=swapped),
    )


def _relations(features: Tensor) -> Tensor:
    """[B, M, 9, 9]."""
    unit = features / (_norm(features) + EPSILON)
    with torch.autocast(features.device.type, enabled=False):
        return unit @ unit.transpose(-1, -2)


def _norm(features: Tensor) -> Tensor:
    """Lengths along the channels, kept; the gradient of a zero vector (a point outside the map) is zero."""
    square = features.square().sum(-1, keepdim=True)
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


def _over_boxes(each: Tensor, boxes: Tensor, variant: Variant) -> Tensor:
    there = present(boxes)
    if variant == "released":
        there = torch.cat([torch.ones_like(there[:, :1]), there[:, 1:]], 1)
    return torch.where(there, each, 0.0).sum() / (there.sum() + EPSILON)


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _wide(maps: Tensor) -> Tensor:
    return maps.to(torch.promote_types(maps.dtype, torch.float32))
