"""The demonstration's data: digits in a wider frame, centred or shifted."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdcore import Data
from kdcore.datasets import TensorSet, split

MARGIN = 3  # pixels about an 8x8 digit
Pixels = Annotated[int, Field(ge=0, le=MARGIN)]
Offset = tuple[int, int]


def framed(image: Tensor, offset: Offset) -> Tensor:
    """An image [1,8,8] in a frame [1,14,14], moved from its middle by (right, down) pixels."""
    right, down = offset
    frame = image.new_zeros(1, 8 + 2 * MARGIN, 8 + 2 * MARGIN)
    frame[:, MARGIN + down : MARGIN + down + 8, MARGIN + right : MARGIN + right + 8] = image
    return frame


class Moving(TensorSet):
    """Digits [1,8,8] that come framed, each time at another place up to ``shift`` pixels from the middle."""

    shift = 0

    def augment(self, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**item, "input": framed(item["input"], _offset(rng, self.shift))}


def shifted_digits(
    *,
    train_shift: Pixels = 0,
    test_shift: Pixels = MARGIN,
    labels: Annotated[int, Field(gt=0)] | None = None,
) -> Data:
    """scikit-learn's digits in frames of 14x14, keys ``input`` [1,14,14] in [0, 1] and ``target``; the id is the row.

    Training images are drawn anew at every use, up to ``train_shift`` pixels from the middle on both axes (0:
    always centred); ``val`` and ``test`` have one place each, drawn by their id, up to ``test_shift``.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images / 16.0, dtype=torch.float32).unsqueeze(1)
    target = torch.tensor(raw.target, dtype=torch.int64)
    train, val, test = split(len(target), (0.15, 0.35), 0, raw.target)
    train = train[:labels]

    def still(ids: Tensor, shift: int) -> TensorSet:
        rngs = [np.random.default_rng((404, int(i))) for i in ids]
        placed = [framed(images[i], _offset(rng, shift)) for i, rng in zip(ids, rngs, strict=True)]
        return TensorSet(ids, input=torch.stack(placed), target=target[ids])

    moving = Moving(train, input=images[train], target=target[train])
    moving.shift = train_shift
    return Data(
        train=moving if train_shift else still(train, 0),
        val=still(val, test_shift),
        test=still(test, test_shift),
        classes=10,
        labels=[str(c) for c in range(10)],
        description=f"scikit-learn digits in frames of 14x14, training shifts up to {train_shift} pixels",
        licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )


def _offset(rng: np.random.Generator, shift: int) -> Offset:
    right, down = rng.integers(-shift, shift + 1, 2).tolist()
    return right, down
