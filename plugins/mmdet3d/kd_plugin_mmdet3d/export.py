"""The part of a detector that has an ONNX form, and the settings of the numpy code around it (``around.py``).

Pillar models: from padded voxels to the head's maps. ImVoxelNet: from an image and the cells' places in it to the
head's maps. What has no ONNX form (sparse convolution, dynamic voxels, point fusion) is refused in words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugin_mmdet3d import around, heads
from kd_plugin_mmdet3d.families import Family, takes_points
from kdcore.errors import InputError


class PillarCore(nn.Module):
    """Voxels [B, P, T, C], their numbers of points [B, P] (0: none) and cells [B, P, 2] to the head's maps."""

    def __init__(self, detector: Any, family: Family) -> None:
        super().__init__()
        pre = "pts_" if hasattr(detector, "pts_voxel_encoder") else ""
        self.encoder, self.scatter = (
            getattr(detector, f"{pre}{n}") for n in ("voxel_encoder", "middle_encoder")
        )
        self.backbone, self.neck = getattr(detector, f"{pre}backbone"), getattr(detector, f"{pre}neck")
        self.head = getattr(detector, family.head)

    def forward(self, voxels: Tensor, num_points: Tensor, coords: Tensor) -> dict[str, Tensor]:
        batch, count = num_points.shape
        rows, columns = self.scatter.ny, self.scatter.nx
        zeros = torch.zeros_like(coords[..., :1])
        places = torch.cat([zeros, zeros, coords], -1).flatten(0, 1)
        points = num_points.flatten().clamp(
            min=1
        )  # one point of zeros where there is no voxel: it is dropped below
        features = self.encoder(voxels.flatten(0, 1).clone(), points, places).unflatten(0, (batch, count))
        last = torch.full_like(coords[..., 0], rows * columns)
        index = torch.where(num_points > 0, coords[..., 0] * columns + coords[..., 1], last)
        canvas = features.new_zeros(batch, features.shape[-1], rows * columns + 1)
        canvas = canvas.scatter(
            2, index.unsqueeze(1).expand(-1, features.shape[-1], -1), features.transpose(1, 2)
        )
        maps = self.neck(self.backbone(canvas[..., :-1].unflatten(2, (rows, columns))))
        return named(self.head(maps))


class ImageCore(nn.Module):
    """A normalised image [B, 3, H, W] and the cells' places in it [B, Z, Y X, 2] to the head's maps."""

    def __init__(self, detector: Any, family: Family) -> None:
        super().__init__()
        self.backbone, self.neck, self.neck_3d = detector.backbone, detector.neck, detector.neck_3d
        self.head, self.cells = getattr(detector, family.head), tuple(detector.n_voxels)

    def forward(self, img: Tensor, grid: Tensor) -> dict[str, Tensor]:
        features = self.neck(self.backbone(img))[0]
        volume = F.grid_sample(features, grid, mode="nearest", align_corners=True)
        x, y, _ = self.cells
        volume = volume.unflatten(3, (y, x)).permute(0, 1, 4, 3, 2)  # [B, C, X, Y, Z]
        return named(self.head(self.neck_3d(volume)))


def named(said: Any) -> dict[str, Tensor]:
    """A head's maps as the graph's outputs."""
    return {name.replace(".", "_"): value for name, value in heads.flat(said)[0].items()}


def core_of(detector: Any, family: Family) -> nn.Module:
    """The graph's module; InputError where the detector, or its head, has no ONNX form here."""
    kinds = {name: type(module).__name__ for name, module in detector.named_children()}
    if getattr(detector, family.head).__class__.__name__ not in ("CenterHead", "Anchor3DHead"):
        raise _refused("a head whose decoding is not written in numpy", kinds)
    if is_center(detector, family) and len(getattr(detector, family.head).task_heads) != 1:
        raise _refused("a CenterHead of several tasks: its decoding is written for one", kinds)
    if family.volume:
        return ImageCore(detector, family)
    wanted = {"PillarFeatureNet", "PointPillarsScatter"}
    if not takes_points(detector) or not wanted <= set(kinds.values()) or "img_backbone" in kinds:
        raise _refused(
            "no ONNX form: only hard pillars have one (sparse convolution and point fusion have none)", kinds
        )
    return PillarCore(detector, family)


def is_center(detector: Any, family: Family) -> bool:
    return heads.is_center(getattr(detector, family.head))


def _refused(problem: str, kinds: dict[str, str]) -> InputError:
    return InputError(
        "export", problem, given=", ".join(kinds.values()), allowed="PillarFeatureNet or ImVoxelNet"
    )


def source(detector: Any, family: Family, most: int) -> str:
    """``around.py`` with this detector's settings, as the file that ships."""
    text = Path(around.__file__).read_text("utf-8")
    return text.replace(
        "SETTINGS: dict[str, Any] = {}", f"SETTINGS: dict[str, Any] = {settings(detector, family, most)!r}"
    )


def settings(detector: Any, family: Family, most: int) -> dict[str, Any]:
    head = getattr(detector, family.head)
    found = _centre(head) if heads.is_center(head) else _anchors(head)
    before = {"image": _image(detector)} if family.volume else {"points": _points(detector)}
    whole: dict[str, Any] = json.loads(
        json.dumps({**before, **found, "most": most})
    )  # plain numbers and lists
    return whole


def _points(detector: Any) -> dict[str, Any]:
    layer = detector.data_preprocessor.voxel_layer
    grid = [round(float(n)) for n in layer.grid_shape]
    limits, count = [float(v) for v in layer.point_cloud_range], layer.max_voxels
    return {
        "low": limits[:3],
        "size": [float(v) for v in layer.voxel_size],
        "grid": grid,
        "points": int(layer.max_num_points),
        "count": int(count[1] if isinstance(count, list | tuple) else count),
    }


def _image(detector: Any) -> dict[str, Any]:
    made, cells = detector.data_preprocessor, [int(n) for n in detector.n_voxels]
    places = detector.prior_generator.grid_anchors([cells[::-1]], device="cpu")[0][:, :3]
    return {
        "mean": made.mean.flatten().tolist(),
        "std": made.std.flatten().tolist(),
        "low": places[0].tolist(),
        "high": places[-1].tolist(),
        "cells": cells,
    }


def _centre(head: Any) -> dict[str, Any]:
    coder, test = head.bbox_coder, head.test_cfg
    names = list(head.task_heads[0].heads)
    factor = float(coder.out_size_factor)
    ranges = coder.post_center_range
    return {
        "centre": {
            "order": [names.index(name) for name in ("reg", "height", "dim", "rot", "heatmap")],
            "most": int(coder.max_num),
            "cell": [factor * float(v) for v in coder.voxel_size],
            "low": [float(v) for v in coder.pc_range],
            "ranges": [float(v) for v in ranges],
            "score": float(coder.score_threshold),
            "logs": bool(head.norm_bbox),
            "nms": {
                "overlap": float(test["nms_thr"]),
                "before": int(test["pre_max_size"]),
                "after": int(test["post_max_size"]),
            },
        },
    }


def _anchors(head: Any) -> dict[str, Any]:
    made, test = head.prior_generator, head.test_cfg
    return {
        "anchors": {
            "ranges": [[float(v) for v in each] for each in made.ranges],
            "sizes": [[float(v) for v in each] for each in made.sizes],
            "turns": [float(v) for v in made.rotations],
            "score": float(test["score_thr"]),
            "first": int(test["nms_pre"]),
            "offsets": [float(head.dir_offset), float(head.dir_limit_offset)],
            "nms": {"overlap": float(test["nms_thr"]), "before": 10**9, "after": 10**9},
            "most": int(test["max_num"]),
        }
    }
