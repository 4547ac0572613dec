"""Data sources on data that ships with libraries, split once by a seed of their own."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdcore.errors import InputError
from kdcore.types import Data

Share = Annotated[float, Field(gt=0, lt=1)]


class TensorSet:
    """A data set held in memory: tensors of equal length, and the ids of their rows."""

    def __init__(self, ids: Tensor, **tensors: Tensor) -> None:
        self.values = {"id": ids, **tensors}

    def __len__(self) -> int:
        return len(self.values["id"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[index] for name, value in self.values.items()}

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.values.items()}


def split(count: int, shares: tuple[float, float], seed: int, target: Any = None) -> tuple[Tensor, ...]:
    """Indices of train, val and test: a fixed shuffle of ``count``, cut by the shares of val and test.

    With ``target`` every class keeps its share in each split (scikit-learn's stratified split).
    """
    from sklearn.model_selection import train_test_split

    val, test = shares
    rest, last = train_test_split(np.arange(count), test_size=test, random_state=seed, stratify=target)
    strata = None if target is None else np.asarray(target)[rest]
    first, middle = train_test_split(rest, test_size=val / (1 - test), random_state=seed, stratify=strata)
    return tuple(torch.tensor(rows) for rows in (first, middle, last))


def digits(
    *,
    labels: Annotated[int, Field(gt=0)] | None = None,
    val: Share = 0.15,
    test: Share = 0.35,
    flat: bool = False,
    split_seed: int = 0,
) -> Data:
    """scikit-learn's digits: 1,797 grey images 8x8 of 10 classes, scaled to [0, 1]; real, shipped, no download.

    ``labels`` keeps that many training images (the first of the split); ``flat`` gives [64] instead of
    [1, 8, 8]. Keys ``input`` float32, ``target`` int64; the id is the row in scikit-learn's order.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 16.0
    images = images.flatten(1) if flat else images.unsqueeze(1)
    target = torch.tensor(raw.target, dtype=torch.int64)
    train, middle, last = split(len(target), (val, test), split_seed, raw.target)
    if labels is not None and labels > len(train):
        allowed = f"1 to {len(train)}"
        raise InputError("data.args.labels", "more than there are", given=labels, allowed=allowed)
    chosen = train[:labels]
    steps: list[dict[str, Any]] = [{"step": "scale", "factor": 1 / 16}]
    steps += [] if flat else [{"step": "add_axis", "axis": 1}]
    pixels = raw.data if flat else raw.images
    first, second, third = (
        TensorSet(ids, input=images[ids], target=target[ids]) for ids in (chosen, middle, last)
    )
    return Data(
        first,
        second,
        third,
        classes=10,
        labels=[str(i) for i in range(10)],
        preprocessing=steps,
        raw=lambda ids: {"input": pixels[list(ids)].astype("float32")},
        description=f"scikit-learn digits, {len(chosen)} training images",
        licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )
