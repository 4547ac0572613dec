"""Views by a network: a small one that is trained from scratch, or one of your own, such as a pretrained decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_hard.views import View
from kdcore import InputError

Count = Annotated[int, Field(gt=0)]


class Edit(nn.Module):
    """x + strength * tanh(net(x, z)): a convolutional edit of images [B,channels,H,W], z [B,noise] given to every pixel.

    No pixel moves by more than ``strength``; the last layer starts at a tenth of torch's default weights.
    """

    def __init__(self, channels: int, noise: int, width: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.net = nn.Sequential(
            nn.Conv2d(channels + noise, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )
        with torch.no_grad():
            for parameter in self.net[-1].parameters():
                parameter.mul_(0.1)

    def forward(self, images: Tensor, z: Tensor) -> Tensor:
        maps = z.view(*z.shape, 1, 1).expand(-1, -1, *images.shape[-2:])
        edit: Tensor = self.net(torch.cat([images, maps], 1))
        return images + self.strength * edit.tanh()


class Generator(View):
    """Any network that turns images and ``noise`` numbers a sample into images; the default edits them (``Edit``).

    ``model``: a callable that returns a module ``(images [B,C,H,W], z [B,noise]) -> images``, given ``args``; its
    parameters that require gradient are trained, the others (a pretrained decoder's) are not. ``channels``,
    ``width`` and ``strength`` (a share of high - low) are the default's. The view is clamped to ``low`` and ``high``.
    """

    def __init__(
        self,
        *,
        channels: Count = 1,
        noise: Count = 8,
        width: Count = 16,
        strength: Annotated[float, Field(gt=0, le=1)] = 0.5,
        model: Callable[..., nn.Module] | None = None,
        args: dict[str, Any] = {},  # noqa: B006 - never written to
        key: str = "input",
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__(key, low, high)
        self.noise = noise
        self.model = model(**args) if model else Edit(channels, noise, width, strength * (high - low))
        self.freeze()
        if not self._trained:
            raise InputError("model", "none of its parameters requires gradient: nothing can be trained")

    def transform(self, images: Tensor, z: Tensor) -> Tensor:
        changed: Tensor = self.model(images, z)
        if changed.shape != images.shape:
            raise InputError("model", "it changes the images' shape", given=tuple(changed.shape))
        return torch.clamp(changed, self.low, self.high)
