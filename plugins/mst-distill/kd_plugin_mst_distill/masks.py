"""MaskNet, and the specialised teacher: a trained net with masks on named layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from kdcore import Batch, InputError, Outputs, Teacher
from kdcore.checkpoint import load_tensors
from kdcore.taps import Taps

Heads = Annotated[int, Field(gt=0)]


class MaskNet(nn.Module):
    """A mask in (0, 1) a channel, from the features themselves: [B,d] or [B,d,H,W] -> [B,d].

    Every channel becomes a token of width ``hidden`` (Linear(d, d * hidden): cubic in d at the default width),
    tokens attend to each other, one number each comes out. ``spatial`` features are reduced to a vector first.
    """

    def __init__(self, features: int, hidden: int, heads: int = 3, spatial: bool = False) -> None:
        super().__init__()
        self.features, self.hidden = features, hidden
        self.reduce = _reduction(features) if spatial else None
        self.embed = nn.Linear(features, features * hidden)
        self.attend = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.score = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        vector = features.flatten(1) if self.reduce is None else self.reduce(features).mean((2, 3))
        tokens = self.embed(vector).reshape(-1, self.features, self.hidden)
        attended, _ = self.attend(tokens, tokens, tokens)
        return self.score(attended).squeeze(-1).sigmoid()  # type: ignore[no-any-return]

    def apply_to(self, features: Tensor) -> Tensor:
        """mask * features, the mask broadcast over space."""
        mask: Tensor = self(features)
        return features * mask.view(*mask.shape, *[1] * (features.dim() - 2))


def _reduction(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def fitting(features: Tensor, heads: int, factor: int, place: str) -> MaskNet:
    """A MaskNet for features of this shape: hidden = d // (factor * heads) * heads, so ``factor`` sets its size."""
    spatial = features.dim() == 4 and features.shape[-2:] != (1, 1)
    width = features.shape[1]
    if features.dim() not in (2, 4):
        raise InputError(place, "a mask needs features [B,d] or [B,d,H,W]", given=tuple(features.shape))
    hidden = width // (factor * heads) * heads
    if not hidden:
        raise InputError(
            place, f"{width} channels are too few for {heads} heads at factor {factor}", hint="lower both"
        )
    return MaskNet(width, hidden, heads, spatial)


def load_mask(path: str, heads: int, place: str) -> MaskNet:
    """The MaskNet that a file holds; its shapes say how wide it is."""
    found = load_tensors(path, place)
    rows, features = found["embed.weight"].shape
    net = MaskNet(features, rows // features, heads, spatial="reduce.0.weight" in found)
    net.load_state_dict(found)
    return net


class Specialised(Teacher):
    """``base`` with a mask on each layer of ``masks`` (layer path -> file of the mask's weights).

    The mask multiplies the layer's output during this teacher's own forward only. Without masks it is the base.
    """

    def __init__(self, *, base: Teacher, masks: dict[str, str] = {}, heads: Heads = 3) -> None:  # noqa: B006
        super().__init__()
        self.base = base
        self.layers = tuple(masks)
        self.nets = nn.ModuleList(load_mask(path, heads, f"teacher.masks.{at}") for at, path in masks.items())
        self.taps = Taps(base.model, {layer: layer for layer in masks}, "teacher.masks")

    @property
    def model(self) -> nn.Module:
        return self.base.model

    def forward(self, batch: Batch) -> Outputs:
        with self.taps.reading(masking(self.layers, self.nets)):
            return self.base(batch)  # type: ignore[no-any-return]


def masking(
    layers: tuple[str, ...], nets: nn.ModuleList | list[MaskNet]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What ``Taps.reading`` replaces: each layer's output by its masked one."""
    return {layer: partial(_masked, net) for layer, net in zip(layers, nets, strict=True)}


def _masked(net: nn.Module, features: Tensor) -> Tensor:
    assert isinstance(net, MaskNet)
    return net.apply_to(features)
