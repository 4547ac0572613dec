"""Tokens of convolutional maps and of transformers, on one grid, and the draw that both networks share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import InputError

MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's multipliers, as signed 64-bit numbers
STEP = -0x61C8864680B583EB  # its increment


def tokens_of(features: Tensor, *, skip: int = 0) -> Tensor:
    """[B,n,D]: the places of a map [B,D,H,W] row by row, or a transformer's tokens [B,n,D].

    ``skip`` leaves out that many leading tokens of a transformer (the class token).
    """
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    if features.dim() != 3 or features.shape[1] <= skip:
        allowed = "a map [B,D,H,W] or tokens [B,n,D], n above the tokens that are left out"
        raise InputError("reads", "gives no tokens", given=tuple(features.shape), allowed=allowed)
    return features[:, skip:]


def same_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both token sets [B,n,D] on the smaller of the two grids, the larger one averaged; grids are taken as square."""
    n = min(student.shape[1], teacher.shape[1])
    return _pooled(student, n), _pooled(teacher, n)


def _pooled(tokens: Tensor, n: int) -> Tensor:
    count = tokens.shape[1]
    if count == n:
        return tokens
    side, small = math.isqrt(count), math.isqrt(n)
    if side * side != count or small * small != n:
        raise InputError("reads", "two grids of tokens that are not square", given=(count, n))
    whole = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(whole, small).flatten(2).transpose(1, 2)


def draw(ids: Tensor, count: int, n: int, seed: int) -> Tensor:
    """int64 [B,min(count,n)]: different places of n for each sample, a function of (seed, id, n) alone.

    So both networks get the same places, and neither the order of the batch, its size nor the number of processes
    matters.
    """
    place = torch.arange(n, device=ids.device)
    key = _mixed(_mixed(ids.unsqueeze(1) * STEP + seed) + place * STEP)
    return key.argsort(1)[:, :count]


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) on int64, which wraps; shifts bring in zeros."""
    for shift, multiplier in zip((30, 27), MIX, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """[B m, D]: the tokens [B,n,D] at each sample's places [B,m], one image after the other."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])).flatten(0, 1)
