"""The demonstration's image tokens and model: digits as 16 tokens of 17 values, and a small causal transformer."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcore import Data
from kdcore.datasets import TensorSet, split

Count = Annotated[int, Field(gt=0)]
SIDE, VALUES, CLASSES = 4, 17, 10
LENGTH = SIDE * SIDE


def digit_tokens(*, split_seed: int = 0) -> Data:
    """scikit-learn's digits, averaged over 2x2 pixels and rounded: a raster of 16 tokens of 0 to 16 an image.

    ``input`` int64 [16]: the class (17 to 26), then the first 15 tokens; ``target`` int64 [16]: all tokens. 1,257
    images for training, 90 for validation, 450 for test.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1)
    tokens = F.avg_pool2d(images, 2).round().long().flatten(1)
    classes = torch.tensor(raw.target, dtype=torch.int64)
    seen = torch.cat([VALUES + classes.unsqueeze(1), tokens[:, :-1]], 1)
    sets = [
        TensorSet(ids, input=seen[ids], target=tokens[ids])
        for ids in split(len(tokens), (0.05, 0.25), split_seed, raw.target)
    ]
    return Data(
        sets[0],
        sets[1],
        sets[2],
        classes=VALUES,
        description="scikit-learn digits as rasters of 16 tokens, the class first",
        licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a layer norm, added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class TokenModel(nn.Module):
    """int64 [B,16] (the class, then tokens) -> logits [B,16,17] of the tokens one further."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VALUES + CLASSES, width)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VALUES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def token_model(*, width: Count = 64, depth: Count = 2, heads: Count = 4) -> TokenModel:
    """A class-conditional causal transformer over the 16 tokens of an image."""
    return TokenModel(width, depth, heads)
