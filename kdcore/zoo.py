"""Small models for demonstrations, tests and first steps. Real work brings its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

Count = Annotated[int, Field(gt=0)]


class ConvNet(nn.Module):
    """Three 3x3 convolutions, the last two with stride 2, global average pooling, a linear head.

    ``images`` [B, in_channels, H, W] -> logits [B, classes]. Stages ``stem``, ``body.0``, ``body.1``; ``pool``
    gives the embedding [B, 4 * width].
    """

    def __init__(self, width: int, classes: int, in_channels: int, norm: str) -> None:
        super().__init__()
        self.stem = _block(in_channels, width, 1, norm)
        self.body = nn.Sequential(_block(width, 2 * width, 2, norm), _block(2 * width, 4 * width, 2, norm))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.body(self.stem(images))))  # type: ignore[no-any-return]


def conv_net(
    *,
    width: Count = 16,
    classes: Count = 10,
    in_channels: Count = 1,
    norm: Literal["batch", "group", "none"] = "batch",
) -> ConvNet:
    """A small convolutional classifier; ``norm = "group"`` has no batch statistics."""
    return ConvNet(width, classes, in_channels, norm)


class MLP(nn.Sequential):
    """Linear layers with ReLU between; the input is flattened. Layers ``hidden0``, ``hidden1``, ..., ``head``."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.add_module("flatten", nn.Flatten())
        for index, width in enumerate(hidden):
            self.add_module(f"hidden{index}", nn.Sequential(nn.Linear(inputs, width), nn.ReLU()))
            inputs = width
        self.add_module("head", nn.Linear(inputs, classes))


def mlp(*, inputs: Count = 64, hidden: tuple[int, ...] = (32,), classes: Count = 10) -> MLP:
    """A multi-layer perceptron."""
    return MLP(inputs, hidden, classes)


def _block(inputs: int, outputs: int, stride: int, norm: str) -> nn.Sequential:
    norms = {"batch": nn.BatchNorm2d(outputs), "group": nn.GroupNorm(1, outputs), "none": nn.Identity()}
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=norm == "none"), norms[norm], nn.ReLU(inplace=True)
    )
