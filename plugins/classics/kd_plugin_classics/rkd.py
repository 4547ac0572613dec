"""Relational knowledge distillation (Park, Kim, Lu, Cho; CVPR 2019, arXiv 1904.05068)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import conventions
from kdcore.functional import at_least_float32

Variant = Literal["paper", "released"]
Weight = Annotated[float, Field(ge=0)]


def distance_loss(student: Tensor, teacher: Tensor, variant: Variant = "paper") -> Tensor:
    """Huber loss between the pairs' distances, each divided by its model's mean distance (Eq. 4 to 6). Scalar.

    Embeddings [B, ...] of both, B >= 2; their sizes may differ.
    """
    apart = _distinct(student)
    huber = F.smooth_l1_loss(
        _distances(student, apart), _distances(teacher.detach(), apart), reduction="none"
    )
    return huber.mean() if variant == "released" else huber[apart].mean()


def angle_loss(student: Tensor, teacher: Tensor, variant: Variant = "paper") -> Tensor:
    """Huber loss between the cosines of the triplets' angles (Eq. 7 to 9). Scalar.

    Embeddings [B, ...] of both, B >= 3; their sizes may differ.
    """
    huber = F.smooth_l1_loss(_angles(student), _angles(teacher.detach()), reduction="none")
    if variant == "released":
        return huber.mean()
    apart = _distinct(student)
    return huber[apart[:, :, None] & apart[:, None, :] & apart[None]].mean()


@conventions(couples_batch=True, zero_at_teacher=True)
def rkd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    *,
    distance_weight: Weight = 25.0,
    angle_weight: Weight = 50.0,
    variant: Variant = "paper",
) -> Tensor:
    """distance_weight * distance_loss + angle_weight * angle_loss of embeddings [B, ...]. Scalar; B >= 3.

    ``paper``: means over the tuples of distinct samples that the paper sums over. ``released``: means over all
    B^2 pairs and B^3 triplets, those that repeat a sample (and are 0) included. No gradient to the teacher.
    """
    if len(student_embedding) < 3:
        raise ValueError(f"rkd_loss compares triplets of samples, and the batch has {len(student_embedding)}")
    student, teacher = student_embedding, teacher_embedding
    return distance_weight * distance_loss(student, teacher, variant) + angle_weight * angle_loss(
        student, teacher, variant
    )


def _distinct(embedding: Tensor) -> Tensor:
    """Bool [B, B]: the pairs of two samples."""
    return ~torch.eye(len(embedding), dtype=torch.bool, device=embedding.device)


def _differences(embedding: Tensor) -> Tensor:
    """[B, B, D]: entry [i, j] points from sample i to sample j."""
    x = at_least_float32(embedding).flatten(1)
    return x.unsqueeze(0) - x.unsqueeze(1)


def _distances(embedding: Tensor, apart: Tensor) -> Tensor:
    """psi_D of all pairs [B, B], 1 on average."""
    distances: Tensor = torch.linalg.vector_norm(_differences(embedding), dim=-1)
    return distances / distances[apart].mean()


def _angles(embedding: Tensor) -> Tensor:
    """psi_A of all triplets [B, B, B]: entry [j, i, k] is the cosine of the angle at j between i and k."""
    e = F.normalize(_differences(embedding), dim=-1)
    return e @ e.mT
