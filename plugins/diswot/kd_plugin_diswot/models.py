"""Students and a teacher for the demonstrations: plain and residual nets with a linear head on a global mean."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

Count = Annotated[int, Field(gt=0)]


class Net(nn.Module):
    """``body`` gives the activations before global pooling [B, C, H, W], ``head`` is linear: logits [B, classes]."""

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


class Block(nn.Module):
    """``convolutions`` convolutions with batch norm; with ``skip`` added to the input (1x1 where it changes shape)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        convolutions: int = 1,
        skip: bool,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(convolutions):
            first = index == 0
            layers += [nn.ReLU()] if index else []
            layers += conv(inputs if first else outputs, outputs, kernel, stride if first else 1)
        self.layers = nn.Sequential(*layers)
        same = inputs == outputs and stride == 1
        self.skip = (
            None if not skip else nn.Identity() if same else nn.Sequential(*conv(inputs, outputs, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return torch.relu(y if self.skip is None else y + self.skip(x))


def conv(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    padding = kernel // 2
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs)]


def small_net(
    *,
    hidden: Count = 12,
    depth: Annotated[int, Field(ge=0)] = 2,
    kernel: Literal[1, 3, 5] = 3,
    pool: Literal["early", "late"] = "early",
    skip: bool = False,
    features: Count = 32,
    classes: Count = 10,
) -> Net:
    """For images [B, 1, H, W]: a 3x3 stem, ``depth`` blocks at half (``pool = "early"``) or full resolution, a 1x1
    convolution to ``features``, which are of equal width in all students whatever ``hidden`` is."""
    shrink = nn.MaxPool2d(2)
    stem = [*conv(1, hidden, 3, 1), nn.ReLU()]
    blocks = [Block(hidden, hidden, kernel=kernel, skip=skip) for _ in range(depth)]
    middle = [shrink, *blocks] if pool == "early" else [*blocks, shrink]
    return Net(nn.Sequential(*stem, *middle, *conv(hidden, features, 1, 1), nn.ReLU()), features, classes)


def stage_net(*, depths: tuple[int, int, int] = (3, 3, 3), classes: Count = 100) -> Net:
    """The residual nets of the authors' space S1, for [B, 3, 32, 32]: 16, 32 and 64 channels, ``depths`` basic blocks."""
    layers: list[nn.Module] = [*conv(3, 16, 3, 1), nn.ReLU()]
    inputs = 16
    for width, depth in zip((16, 32, 64), depths, strict=True):
        for index in range(depth):
            stride = 2 if index == 0 and width > 16 else 1
            layers.append(Block(inputs, width, stride=stride, convolutions=2, skip=True))
            inputs = width
    return Net(nn.Sequential(*layers), inputs, classes)
