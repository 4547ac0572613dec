"""The two losses of the adapter: contrast with the class prototypes, and guidance by CLIP's own distribution."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import conventions

Temperature = Annotated[float, Field(gt=0)]


@conventions(t_squared=False)
def guidance_loss(
    student_adapted_text: Tensor, student_image_text: Tensor, *, temperature: Temperature = 5.0
) -> Tensor:
    """L_kd = -sum_c softmax(I / T)_c log softmax(N / T)_c over all classes: a cross-entropy, without T^2.

    N (``student_adapted_text``) and I (``student_image_text``) are logits [B,C] with CLIP's scale in them; returns
    [B]. I is the guide and takes no gradient. The smallest value is the guide's entropy, at N = I + a constant a row.
    """
    guide = F.softmax(student_image_text.detach().float() / temperature, -1)
    return -(guide * F.log_softmax(student_adapted_text.float() / temperature, -1)).sum(-1)


def vision_loss(vision: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
    """L_v = CE(V, y) among the classes of the episode: logits [B,C], labels [B], ``present`` bool [C]; returns [B]."""
    if present is not None:
        vision = vision.masked_fill(~present, float("-inf"))
    return F.cross_entropy(vision.float(), target, reduction="none")
