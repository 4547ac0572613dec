"""mean average precision on the ground plane, as nuScenes defines it: matches by distance of the centres."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

Array = NDArray[Any]
DISTANCES = (0.5, 1.0, 2.0, 4.0)  # metres
MIN_RECALL = MIN_PRECISION = 0.1
POINTS = 101


class NuScenesMAP(Metric):
    """Mean over classes and distances of the average precision, 0 to 1.

    ``update(prediction, target)``: [B, K, 9] rows x, y, z, dx, dy, dz, yaw, score, label, and [B, M, 8 or more] rows
    with the label last; label -1 is no row. Every class in the targets counts. No truth at all gives NaN.
    """

    full_state_update = False
    higher_is_better = True
    scenes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("true", [], dist_reduce_fx="cat")
        self.add_state("scenes", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Rows are kept as scene, label, score (1 for truth), x, y."""
        for rows, kept, scored in ((prediction, self.predicted, True), (target, self.true, False)):
            there = (rows[..., -1] >= 0).nonzero()
            found = rows[there[:, 0], there[:, 1]].double()
            score = found[:, -2] if scored else torch.ones_like(found[:, 0])
            scene = (there[:, 0] + self.scenes).to(found)
            assert isinstance(kept, list)
            kept.append(torch.stack([scene, found[:, -1], score, found[:, 0], found[:, 1]], 1))
        self.scenes = self.scenes + len(target)

    def compute(self) -> Tensor:
        predicted, true = (_joined(each) for each in (self.predicted, self.true))
        labels = np.unique(true[:, 1])
        found = [
            average_precision(predicted[predicted[:, 1] == label], true[true[:, 1] == label], distance)
            for label in labels
            for distance in DISTANCES
        ]
        return torch.tensor(float(np.mean(found)) if found else float("nan"))


def average_precision(predicted: Array, true: Array, distance: float) -> float:
    """Of rows scene, label, score, x, y of one class: nuScenes's AP at one distance.

    Each prediction, best first, takes the nearest truth of its scene that is still free, if within the distance.
    """
    order = np.argsort(-predicted[:, 2], kind="stable")
    hits = _matches(predicted[order], true, distance)
    if not hits.any():
        return 0.0
    right = np.cumsum(hits)
    precision, recall = right / np.arange(1, len(hits) + 1), right / len(true)
    at = np.interp(np.linspace(0, 1, POINTS), recall, precision, right=0)
    above = np.clip(at[round(100 * MIN_RECALL) + 1 :] - MIN_PRECISION, 0, None)
    return float(above.mean()) / (1 - MIN_PRECISION)


def _matches(predicted: Array, true: Array, distance: float) -> Array:
    free = {scene: np.flatnonzero(true[:, 0] == scene).tolist() for scene in np.unique(true[:, 0])}
    hits = np.zeros(len(predicted), bool)
    for row, (scene, _, _, x, y) in enumerate(predicted):
        left = free.get(scene, [])
        away = [float(np.hypot(true[i, 3] - x, true[i, 4] - y)) for i in left]
        if away and min(away) < distance:
            left.pop(int(np.argmin(away)))
            hits[row] = True
    return hits


def _joined(kept: Any) -> Array:
    rows = torch.cat(list(kept)) if isinstance(kept, list) and kept else kept
    return np.zeros((0, 5)) if isinstance(rows, list) else rows.cpu().numpy()
