"""Affine views: shift, rotation, scale and shear from a learned distribution, by bilinear sampling."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_plugin_hard.views import Bound, Spread, View


def affine(
    images: Tensor,
    *,
    shift: Tensor,
    rotation: Tensor,
    scale: Tensor,
    shear: Tensor,
    fill: float = 0.0,
    padding: Literal["zeros", "border", "reflection"] = "zeros",
) -> Tensor:
    """The content of images [B,C,H,W] moved about their centre: x' = R S Z x + shift, in pixels, y down.

    ``shift`` [B,2] (right, down) as shares of width and height; ``rotation`` [B] in radians, from the x axis
    towards the y axis; ``scale`` [B] factors (Z); ``shear`` [B]: S moves a row at y by shear * y to the right.
    Pixels from outside are ``fill`` with "zeros". Differentiable in all tensors.
    """
    height, width = images.shape[-2:]
    cos, sin = rotation.cos(), rotation.sin()
    # the grid says where each output pixel comes from: x = (R S Z)^-1 (x' - shift), Z^-1 S^-1 R^-1 written out
    rows = [
        torch.stack([cos + shear * sin, sin - shear * cos], 1),
        torch.stack([-sin, cos], 1),
    ]
    inverse = torch.stack(rows, 1) / scale.view(-1, 1, 1)
    inverse[:, 0, 1] *= height / width  # affine_grid's coordinates run from -1 to 1 on both axes
    inverse[:, 1, 0] *= width / height
    theta = torch.cat([inverse, -inverse @ (2 * shift).unsqueeze(2)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - fill, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return moved + fill


class Affine(View):
    """Shift (share of the side), rotation (degrees), scale (a factor of 1/(1+scale) to 1+scale) and shear, up to bounds.

    ``spread``: how far the untrained distribution reaches, 1 uniform over the bounds; 0 is no change.
    ``padding``: what stands outside the image: its background ``low`` ("zeros"), its edge or its mirror image.
    """

    def __init__(
        self,
        *,
        shift: Annotated[float, Field(ge=0, le=1)] = 0.25,
        rotation: Annotated[float, Field(ge=0, le=180)] = 30.0,
        scale: Bound = 0.3,
        shear: Bound = 0.2,
        spread: Bound = 0.1,
        padding: Literal["zeros", "border", "reflection"] = "zeros",
        key: str = "input",
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__(key, low, high)
        bounds = {"right": shift, "down": shift, "rotation": math.radians(rotation)}
        self.spread = Spread({**bounds, "scale": math.log1p(scale), "shear": shear}, spread)
        self.noise, self.padding = self.spread.size, padding
        self.freeze()

    def reach(self) -> dict[str, float]:
        return self.spread.reach()

    def transform(self, images: Tensor, z: Tensor) -> Tensor:
        drawn = self.spread(z)
        none = images.new_zeros(len(images))
        return affine(
            images,
            shift=torch.stack([drawn.get("right", none), drawn.get("down", none)], 1),
            rotation=drawn.get("rotation", none),
            scale=drawn.get("scale", none).exp(),
            shear=drawn.get("shear", none),
            fill=self.low,
            padding=self.padding,
        )
