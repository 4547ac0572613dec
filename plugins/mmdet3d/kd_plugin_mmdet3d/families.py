"""What the detectors of mmdetection3d have in common: where their bird's-eye-view maps are, and how to call them.

Nothing of mmdet3d is edited: maps are read by forward hooks that live for one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdcore.errors import InputError


@dataclass(frozen=True)
class Family:
    """Detectors that are called alike.

    ``low``: the module whose output (with ``.in``, input) is the map before the BEV encoder; ``head``: the head, whose
    input is the map after it. ``volume``: the low map is [B, C, X, Y, Z]. ``points``, ``image``: what it is given.
    """

    low: str
    head: str
    volume: bool = False
    takes: str = "metas"


FAMILIES = {  # by class name, found along the class's ancestors
    "ImVoxelNet": Family("neck_3d.in", "bbox_head", volume=True, takes="samples"),
    "MVXTwoStageDetector": Family("pts_middle_encoder", "pts_bbox_head", takes="metas"),
    "DynamicVoxelNet": Family("middle_encoder", "bbox_head", takes="inputs"),
    "VoxelNet": Family("middle_encoder", "bbox_head", takes="inputs"),
}


def family_of(detector: nn.Module, place: str) -> Family:
    names = [each.__name__ for each in type(detector).__mro__]
    found = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if found is None:
        raise InputError(
            f"{place}.config",
            "no bird's-eye-view detector that this plugin knows",
            given=names[0],
            allowed=f"{', '.join(FAMILIES)}, and classes derived from them",
        )
    return found


def takes_points(detector: nn.Module) -> bool:
    return any(hasattr(detector, name) for name in ("voxel_encoder", "pts_voxel_encoder"))


def takes_image(detector: nn.Module, family: Family) -> bool:
    return family.volume or hasattr(detector, "img_backbone")


@contextmanager
def watched(detector: nn.Module, family: Family) -> Iterator[dict[str, Tensor]]:
    """Record ``low`` and ``high`` of the forwards in this block, [B, C, rows along y, columns along x]."""
    modules, seen = dict(detector.named_modules()), {}  # type: dict[str, nn.Module], dict[str, Tensor]
    name = family.low.removesuffix(".in")

    def low(_: nn.Module, args: Any, output: Any = None) -> None:
        seen["low"] = along_yx(first(args if output is None else output), family.volume)

    def high(_: nn.Module, args: Any) -> None:
        seen["high"] = first(args)

    register = "register_forward_pre_hook" if family.low.endswith(".in") else "register_forward_hook"
    handles = [getattr(modules[name], register)(low), modules[family.head].register_forward_pre_hook(high)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def along_yx(maps: Tensor, volume: bool) -> Tensor:
    """[B, C, Y, X] of a map as it is, or of a volume [B, C, X, Y, Z], averaged over Z."""
    return maps.mean(-1).transpose(-1, -2) if volume else maps


def first(value: Any) -> Tensor:
    """The first tensor of nested lists and tuples: a module's only map, or its finest."""
    while isinstance(value, list | tuple):
        value = value[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a map, found {type(value).__name__}")
    return value


def features(detector: nn.Module, family: Family, inputs: Mapping[str, Any], samples: list[Any]) -> Any:
    """What the head is called with."""
    if family.takes == "inputs":
        return detector.extract_feat(inputs)  # type: ignore[operator]
    if family.takes == "samples":
        return detector.extract_feat(inputs, samples)[0]  # type: ignore[operator]
    return detector.extract_feat(inputs, [each.metainfo for each in samples])[1]  # type: ignore[operator]
