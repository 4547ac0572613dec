"""The demonstration's data: digits whose classes get rarer and rarer."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdcore import Data
from kdcore.datasets import TensorSet, split

Count = Annotated[int, Field(gt=0)]


def counts(head: int, tail: int, classes: int = 10) -> list[int]:
    """Images of each class, falling geometrically from ``head`` to ``tail``."""
    return [round(head * (tail / head) ** (c / (classes - 1))) for c in range(classes)]


def long_tailed(*, head: Count = 90, tail: Count = 9, balanced: bool = False, split_seed: int = 0) -> Data:
    """scikit-learn's digits [1,8,8] in [0, 1]; of class c the training split keeps ``counts(head, tail)[c]`` images.

    ``balanced`` keeps them all (1,078, about 108 a class): what the teacher learned from. Val (180) and test (539)
    are balanced and the same in both. Key ``input`` float32, ``target`` int64; the id is the row.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16.0
    target = torch.tensor(raw.target, dtype=torch.int64)
    train, val, test = split(len(target), (0.1, 0.3), split_seed, raw.target)
    if not balanced:
        kept = [train[target[train] == c][:n] for c, n in enumerate(counts(head, tail))]
        train = torch.cat(kept)

    def part(ids: Tensor) -> TensorSet:
        return TensorSet(ids, input=images[ids], target=target[ids])

    return Data(
        train=part(train),
        val=part(val),
        test=part(test),
        classes=10,
        labels=[str(c) for c in range(10)],
        preprocessing=[{"step": "scale", "factor": 1 / 16}, {"step": "add_axis", "axis": 1}],
        raw=lambda ids: {"input": raw.images[list(ids)].astype("float32")},
        description=f"scikit-learn digits, {len(train)} training images, {'balanced' if balanced else 'long-tailed'}",
        licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )
