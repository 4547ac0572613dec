"""Colour views: brightness, contrast, saturation and hue from a learned distribution."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kd_plugin_hard.views import Bound, Spread, View


def colour(
    images: Tensor, *, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor
) -> Tensor:
    """Images [B,C,H,W], all others [B]: (x - m) * contrast + m + brightness, m the image's mean over all pixels.

    Of three channels the colour, x less its mean over channels, is then multiplied by ``saturation`` and turned by
    ``hue`` radians about the grey axis (120 degrees: red to green to blue). Not clamped. Differentiable in all.
    """
    mean = images.mean((1, 2, 3), keepdim=True)
    x = (images - mean) * _wide(contrast) + mean + _wide(brightness)
    if images.shape[1] != 3:
        return x
    grey = x.mean(1, keepdim=True)
    chroma = x - grey
    # the cross product with the grey axis (1, 1, 1) / sqrt 3
    turned = (chroma.roll(1, 1) - chroma.roll(-1, 1)) / math.sqrt(3)
    return grey + _wide(saturation) * (_wide(hue.cos()) * chroma + _wide(hue.sin()) * turned)


def _wide(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


class Colour(View):
    """Brightness (a share of high - low), contrast and saturation (factors of 1/(1+bound) to 1+bound), hue (degrees).

    Saturation and hue act on three channels only. The view is clamped to ``low`` and ``high``. ``spread``: how far
    the untrained distribution reaches, 1 uniform over the bounds (of the factors, their logarithm); 0 is no change.
    """

    def __init__(
        self,
        *,
        brightness: Bound = 0.3,
        contrast: Bound = 1.0,
        saturation: Bound = 1.0,
        hue: Annotated[float, Field(ge=0, le=180)] = 30.0,
        spread: Bound = 0.1,
        key: str = "input",
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__(key, low, high)
        factors = {"contrast": math.log1p(contrast), "saturation": math.log1p(saturation)}
        bounds = {"brightness": brightness * (high - low), **factors, "hue": math.radians(hue)}
        self.spread = Spread(bounds, spread)
        self.noise = self.spread.size
        self.freeze()

    def reach(self) -> dict[str, float]:
        return self.spread.reach()

    def transform(self, images: Tensor, z: Tensor) -> Tensor:
        drawn, none = self.spread(z), images.new_zeros(len(images))
        changed = colour(
            images,
            brightness=drawn.get("brightness", none),
            contrast=drawn.get("contrast", none).exp(),
            saturation=drawn.get("saturation", none).exp(),
            hue=drawn.get("hue", none),
        )
        return torch.clamp(changed, self.low, self.high)
