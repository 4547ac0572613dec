"""Recall at k of a matrix of pair scores, in both directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def recall(scores: Tensor, target: Tensor, k: int = 1) -> tuple[float, float]:
    """(text, image) retrieval recall at k of ``scores`` [n,m], where text ``target[i]`` belongs to image i.

    Text retrieval ranks the m texts of an image; image retrieval the n images of a text that belongs to one.
    """
    rows = (scores.topk(min(k, scores.shape[1]), 1).indices == target[:, None]).any(1)
    found = scores.topk(min(k, len(scores)), 0).indices[:, target]
    columns = (target[found] == target).any(0)
    return rows.float().mean().item(), columns.float().mean().item()


class MeanRecall(Metric):
    """The mean of text and image retrieval recall at 1: what the authors choose checkpoints by.

    Every sample scores all texts of the split [B,m], in one order; ``target`` [B] is its own text.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scores: list[Tensor]
        self.target: list[Tensor]
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, target: Tensor) -> None:
        self.scores.append(scores)
        self.target.append(target)

    def compute(self) -> Tensor:
        return torch.tensor(recall(torch.cat(self.scores), torch.cat(self.target))).mean()
