"""The demonstration's data: digits with few labels, and labels as a systematically confused teacher saw them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdcore import Data, InputError
from kdcore.datasets import TensorSet

PAIRS = ((0, 1), (2, 3), (4, 5))  # the classes that the teacher takes for each other
HELD_OUT = 597
Count = Annotated[int, Field(gt=0)]


def few_labels(
    *,
    shots: Count = 4,
    noise: Annotated[float, Field(ge=0)] = 0.3,
    tune: Count = 200,
    val: Count = 200,
    confused: bool = False,
    swap: Annotated[float, Field(ge=0, le=1)] = 0.45,
    split_seed: int = 0,
) -> Data:
    """scikit-learn's digits [64] with Gaussian noise, split by ``split_seed``: 597 test, ``val``, ``tune``, the rest train.

    Train is two streams: ``labelled`` (``shots`` a class) and ``unlabelled`` (the others, no target). With
    ``confused`` it is one stream, ``labelled``, of all training images, whose labels within PAIRS are swapped with
    probability ``swap``: what the teacher learned from. Key ``input`` float32 [64]; the id is the row.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    rng = np.random.default_rng((split_seed, 505))
    pixels = raw.data / 16.0 + noise * rng.standard_normal(raw.data.shape)
    inputs = torch.tensor(pixels, dtype=torch.float32)
    target = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.tensor(rng.permutation(len(target)))
    cuts = [HELD_OUT, val, tune, len(target) - HELD_OUT - val - tune]
    if cuts[-1] < 10 * shots + 10:
        raise InputError("data.args", "too few images are left to train on", given={"tune": tune, "val": val})
    test_ids, val_ids, tune_ids, pool = order.split(cuts)

    def part(ids: Tensor) -> TensorSet:
        return TensorSet(ids, input=inputs[ids], target=target[ids])

    if confused:
        train = {"labelled": TensorSet(pool, input=inputs[pool], target=_confused(target[pool], swap, rng))}
    else:
        first = torch.cat([pool[target[pool] == c][:shots] for c in range(10)])
        rest = pool[~torch.isin(pool, first)]
        train = {"labelled": part(first), "unlabelled": TensorSet(rest, input=inputs[rest])}
    return Data(
        train=train,
        val=part(val_ids),
        test=part(test_ids),
        tune=part(tune_ids),
        classes=10,
        labels=[str(c) for c in range(10)],
        description=f"scikit-learn digits with noise {noise}, {shots} labels a class, {len(pool)} training images",
        licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )


def _confused(target: Tensor, swap: float, rng: np.random.Generator) -> Tensor:
    partner = torch.arange(10)
    for a, b in PAIRS:
        partner[a], partner[b] = b, a
    swapped = torch.tensor(rng.random(len(target)) < swap)
    return torch.where(swapped, partner[target], target)
