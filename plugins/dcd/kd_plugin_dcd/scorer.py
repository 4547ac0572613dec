"""A small cross-encoder: two uni-modal towers, then layers that see both; for demonstrations and tests."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

Count = Annotated[int, Field(gt=0)]


class Block(nn.Module):
    """A residual layer, x + W2 relu(W1 norm(x)): without it the layers around it still fit each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class PairScorer(nn.Module):
    """Scores [B,N] of N texts [B,N,D_t] for each image [B,D_x]: how well they match.

    u and v are the towers' features; the fusion takes (u, v, u * v) through ``blocks`` to one score. Modules
    ``image``, ``text`` (the towers), ``fuse``, ``blocks.0``, ..., ``head``.
    """

    def __init__(self, image: int, text: int, width: int, depth: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(image, width), nn.ReLU())
        self.text = nn.Sequential(nn.Linear(text, width), nn.ReLU())
        self.fuse = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        v = self.text(text)
        u = self.image(image).unsqueeze(1).expand_as(v)
        return self.head(self.blocks(self.fuse(torch.cat([u, v, u * v], -1)))).squeeze(-1)  # type: ignore[no-any-return]


def pair_scorer(*, image: Count = 20, text: Count = 20, width: Count = 64, depth: Count = 6) -> PairScorer:
    """A cross-encoder of two vectors."""
    return PairScorer(image, text, width, depth)
