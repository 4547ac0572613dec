"""The demonstration's data: noisy digits, and labels in which some classes are taken for others."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from kdcore import Data, InputError
from kdcore.datasets import TensorSet


def confused_digits(
    *,
    labels: Annotated[int, Field(gt=0)] = 200,
    confused: dict[str, int] = {},  # noqa: B006 - never written to
    noise: Annotated[float, Field(ge=0)] = 0.25,
    split_seed: int = 0,
) -> Data:
    """scikit-learn's digits, [64] in [0, 1] plus Gaussian noise of this standard deviation, drawn once.

    1,000 images for training, of which the first ``labels`` are kept, 100 for validation, 697 for test. ``confused``
    renames classes in the training images alone: ``{"3" = 8}`` makes every 3 an 8, for a teacher to learn wrongly.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    if not set(confused) <= set("0123456789") or not set(confused.values()) <= set(range(10)):
        raise InputError("data.args.confused", "digits are renamed", given=confused, allowed='{"3" = 8}')
    rng = np.random.default_rng((split_seed, 909))
    images = torch.tensor(raw.data / 16 + noise * rng.standard_normal(raw.data.shape), dtype=torch.float32)
    target = torch.tensor(raw.target, dtype=torch.int64)
    train, val, test = torch.tensor(rng.permutation(len(target))).split([1000, 100, 697])
    if labels > len(train):
        raise InputError("data.args.labels", "more than there are", given=labels, allowed="1 to 1000")
    train = train[:labels]
    names = torch.tensor([confused.get(str(c), c) for c in range(10)])
    held = [TensorSet(ids, input=images[ids], target=target[ids]) for ids in (val, test)]
    return Data(
        TensorSet(train, input=images[train], target=names[target[train]]),
        held[0],
        held[1],
        classes=10,
        labels=[str(c) for c in range(10)],
        description=f"scikit-learn digits with noise {noise}, {labels} training images",
        licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )
