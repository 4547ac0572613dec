"""The trilateral geometry of student, teacher and label, and the small network that reads a ratio off it.

S, T, G, Tbar: probabilities of the student and the teacher (temperature 1), the one-hot label, and the teacher's mean
over the training samples of the sample's class; all [B,C].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def class_means(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """[C,C], float32: row c is the teacher's mean probability over all samples whose *label* is c.

    ``pairs``: batches, at least one, of teacher probabilities [B,C] and labels int64 [B]. A class that never comes
    has a uniform row.
    """
    total = count = torch.zeros(())
    for T, y in pairs:
        G = F.one_hot(y, T.shape[1]).double()
        total, count = total.to(G) + G.T @ T.double(), count.to(G) + G.sum(0)
    return torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], 1 / len(count)).float()


def trilateral(S: Tensor, T: Tensor, Tbar: Tensor, G: Tensor, *, squared: bool = False) -> Tensor:
    """Delta [B,9C]: the edges G-S, G-T, T-S, G-Tbar, Tbar-S, then the vertices S, T, Tbar, G.

    ``squared``: as released, the vertices S, T, G, Tbar, then the squared edges of Tbar-S, G-S, T-S, T-G, Tbar-G.
    """
    if squared:
        edges = [(a - b).square() for a, b in ((Tbar, S), (G, S), (T, S), (T, G), (Tbar, G))]
        return torch.cat([S, T, G, Tbar, *edges], 1)
    return torch.cat([G - S, G - T, T - S, G - Tbar, Tbar - S, S, T, Tbar, G], 1)


class FusionRatio(nn.Sequential):
    """f_omega: Delta [B,9C] -> alpha [B] in (0, 1). Linear layers with LeakyReLU between, then a sigmoid.

    ``hidden``: (128,) is the paper's for images; (32, 16) the released controller.
    """

    def __init__(self, classes: int, hidden: tuple[int, ...] = (128,)) -> None:
        super().__init__()
        inputs = 9 * classes
        for index, width in enumerate(hidden):
            self.add_module(f"hidden{index}", nn.Sequential(nn.Linear(inputs, width), nn.LeakyReLU()))
            inputs = width
        self.add_module("last", nn.Linear(inputs, 1))

    def forward(self, delta: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(delta)).squeeze(1)
