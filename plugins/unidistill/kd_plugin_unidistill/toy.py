"""The small demonstration: bird's-eye-view grids of boxes, sharp as a LiDAR sees them and blurred as a camera does."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from kdcore import Data
from kdcore.datasets import TensorSet

Array = NDArray[Any]
Count = Annotated[int, Field(gt=0)]
CELLS, BOXES = 20, 3  # an area of 20 m by 20 m, cells of 1 m


def grids(
    *,
    train: Count = 24,
    val: Count = 40,
    test: Count = 160,
    blur: Annotated[int, Field(gt=0)] = 5,
    seed: int = 0,
) -> Data:
    """Scenes of three turned boxes. ``lidar`` and ``camera`` float32 [B, 3, 20, 20]: occupancy, cos and sin of twice the
    yaw, with noise 0.15, and the same under a ``blur`` by ``blur`` mean with noise 0.25. ``target`` int64 [B, 20, 20]:
    1 inside a box. ``boxes`` [B, 3, 8] as the losses take them."""
    rng = np.random.default_rng((seed, 1508))
    values = _scenes(train + val + test, blur, rng)
    cuts = torch.arange(train + val + test).split([train, val, test])
    parts = [TensorSet(ids, **{name: value[ids] for name, value in values.items()}) for ids in cuts]
    return Data(
        train=parts[0],
        val=parts[1],
        test=parts[2],
        classes=2,
        labels=("free", "vehicle"),
        description=f"synthetic bird's-eye-view grids, camera blurred {blur} x {blur}",
    )


def _scenes(count: int, blur: int, rng: np.random.Generator) -> dict[str, Tensor]:
    boxes = np.zeros((count, BOXES, 8))
    boxes[..., :2] = rng.uniform(3, CELLS - 3, (count, BOXES, 2))
    boxes[..., 3:6] = rng.uniform((3.0, 1.5, 1.5), (6.0, 2.5, 2.0), (count, BOXES, 3))
    boxes[..., 6] = rng.uniform(-np.pi, np.pi, (count, BOXES))
    inside, yaw = _raster(boxes)
    sharp = np.stack([inside, inside * np.cos(2 * yaw), inside * np.sin(2 * yaw)], 1)
    soft = nn.functional.avg_pool2d(
        torch.from_numpy(sharp), blur, 1, blur // 2, count_include_pad=True
    ).numpy()
    noisy = {"lidar": (sharp, 0.15), "camera": (soft, 0.25)}
    found = {
        name: torch.from_numpy(maps + scale * rng.standard_normal(maps.shape)).float()
        for name, (maps, scale) in noisy.items()
    }
    return {
        **found,
        "target": torch.from_numpy(inside.astype(np.int64)),
        "boxes": torch.from_numpy(boxes).float(),
    }


def _raster(boxes: Array) -> tuple[Array, Array]:
    """[N, 20, 20] (y, x): 1 where a cell's centre is in a box, and the yaw of the last such box."""
    y, x = np.meshgrid(np.arange(CELLS) + 0.5, np.arange(CELLS) + 0.5, indexing="ij")
    inside, yaw = np.zeros((len(boxes), CELLS, CELLS)), np.zeros((len(boxes), CELLS, CELLS))
    for box in boxes.transpose(1, 0, 2):
        dx, dy, angle = (v[:, None, None] for v in (box[:, 0], box[:, 1], box[:, 6]))
        along = np.cos(angle) * (x - dx) + np.sin(angle) * (y - dy)
        across = -np.sin(angle) * (x - dx) + np.cos(angle) * (y - dy)
        hit = (2 * np.abs(along) < box[:, 3, None, None]) & (2 * np.abs(across) < box[:, 4, None, None])
        inside, yaw = np.maximum(inside, hit), np.where(hit, angle, yaw)
    return inside, yaw


class Grid(nn.Module):
    """[B, 3, H, W] to ``logits`` [B, 2, H, W], with ``low``, ``high`` and ``heatmap`` (the log-odds of a vehicle)."""

    def __init__(self, *, width: Count = 16) -> None:
        super().__init__()
        self.view = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.encoder = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2, 1))

    def forward(self, grid: Tensor) -> dict[str, Tensor]:
        low = self.view(grid)
        high = self.encoder(low)
        logits = self.head(high)
        return {"logits": logits, "low": low, "high": high, "heatmap": logits[:, 1:] - logits[:, :1]}
