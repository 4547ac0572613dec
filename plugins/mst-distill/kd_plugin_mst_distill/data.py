"""The demonstration's data: digits cut in two, noisy, so that each half is a modality that says part of the answer."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdcore import Data, InputError
from kdcore.datasets import TensorSet

Count = Annotated[int, Field(gt=0)]


def paired_digits(
    *,
    train: Count = 200,
    val: Count = 300,
    noise: Annotated[float, Field(ge=0)] = 0.25,
    split_seed: int = 0,
) -> Data:
    """scikit-learn's digits with Gaussian noise, cut in two: keys ``top`` and ``bottom`` [32], ``both`` [64], float32.

    ``train`` and ``val`` images, the rest is test, split by ``split_seed``; the id is the row.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    rng = np.random.default_rng((split_seed, 707))
    both = torch.tensor(raw.data / 16.0 + noise * rng.standard_normal(raw.data.shape), dtype=torch.float32)
    target = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.tensor(rng.permutation(len(target)))
    if train + val >= len(order):
        raise InputError("data.args", "leaves no test image", given={"train": train, "val": val})

    def part(ids: Tensor) -> TensorSet:
        top, bottom = both[ids, :32], both[ids, 32:]
        return TensorSet(ids, top=top, bottom=bottom, both=both[ids], target=target[ids])

    train_ids, val_ids, test_ids = order.split([train, val, len(order) - train - val])
    return Data(
        train=part(train_ids),
        val=part(val_ids),
        test=part(test_ids),
        classes=10,
        labels=[str(c) for c in range(10)],
        description=f"scikit-learn digits cut in two, noise {noise}, {train} training images",
        licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )
