"""What the families of views share: a view is a differentiable function of images and of noise."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcore import Augmentation, Batch, InputError

Bound = Annotated[float, Field(ge=0)]


class View(Augmentation):
    """A random view of images: ``transform(images, z)`` with ``noise`` standard normal numbers a sample as z.

    As an augmentation of its own it draws z and stays as it is: its parameters are frozen until HARD trains them.
    Inputs lie between ``low``, which is the background, and ``high``.
    """

    noise: int

    def __init__(self, key: str, low: float, high: float) -> None:
        super().__init__()
        if low >= high:
            raise InputError("low", "not below high", given=(low, high))
        self.key, self.low, self.high = key, low, high
        self._trained: list[nn.Parameter] = []

    def freeze(self) -> None:
        """Called once by a family's constructor, when its parameters are there."""
        self._trained = [p for p in self.parameters() if p.requires_grad]
        self.requires_grad_(False)

    def thaw(self) -> None:
        for parameter in self._trained:
            parameter.requires_grad_(True)

    @abstractmethod
    def transform(self, images: Tensor, z: Tensor) -> Tensor:
        """[B,C,H,W] and [B,noise] -> images of the same shape; differentiable in images, z and parameters."""

    def view(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """``transform`` with z drawn from ``generator`` (on the CPU)."""
        return self.transform(images, torch.randn(len(images), self.noise, generator=generator).to(images))

    def reach(self) -> dict[str, float]:
        """What to log of the distribution, by name."""
        return {}

    def forward(self, batch: Batch) -> Batch:
        changed, generator = batch.copy(), self.run.generator
        for part in parts_of(changed, self.key):
            with torch.no_grad():
                part[self.key] = self.view(part[self.key], generator)
        return changed


class Spread(nn.Module):
    """z [B,n] -> parameters within ±bound, [B] each by name: bound * erf((L z + mean) / sqrt 2).

    L starts as ``spread`` times the identity and mean at 0, so the median is no change; spread 1 is uniform over
    ±bound, smaller ones crowd about 0. A parameter whose bound is 0 is left out.
    """

    bounds: Tensor

    def __init__(self, bounds: Mapping[str, float], spread: float) -> None:
        super().__init__()
        self.names = tuple(name for name, bound in bounds.items() if bound)
        if not self.names:
            raise InputError("", "every bound is 0: there is nothing to vary", allowed=", ".join(bounds))
        self.size = len(self.names)
        self.register_buffer("bounds", torch.tensor([bounds[n] for n in self.names]), persistent=False)
        self.linear = nn.Linear(self.size, self.size)
        with torch.no_grad():
            self.linear.weight.copy_(spread * torch.eye(self.size))
            self.linear.bias.zero_()

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        values = self.bounds * torch.erf(self.linear(z) / math.sqrt(2))
        return dict(zip(self.names, values.unbind(1), strict=True))

    def reach(self) -> dict[str, float]:
        """How far each parameter's distribution reaches, the norm of its row of L: 1 is uniform over its bound."""
        return dict(zip(self.names, self.linear.weight.detach().norm(dim=1).tolist(), strict=True))


def parts_of(batch: Batch, key: str) -> list[Batch]:
    """The streams of a batch (itself, where it has none) that hold images [B,C,H,W] under ``key``, at least one."""
    found = [part for part in batch.parts.values() or [batch] if key in part]
    if not found:
        raise InputError("augmentation.key", "the batch has no such value", given=key, allowed=sorted(batch))
    for images in (part[key] for part in found):
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(
                "augmentation.key", f"{key!r} is no image", given=given, allowed="float [B,C,H,W]"
            )
    return found
