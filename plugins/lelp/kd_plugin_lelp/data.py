"""Demonstration data with few classes whose hidden subclasses are known: Gaussian clusters."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from kdcore import Data
from kdcore.datasets import TensorSet

Count = Annotated[int, Field(gt=0)]


def clusters(
    *,
    train: Count = 400,
    subclasses: Count = 5,
    dim: Count = 20,
    spread: Annotated[float, Field(gt=0)] = 1.2,
    world: int = 0,
) -> Data:
    """Two classes of ``subclasses`` Gaussian clusters each, with random means (sd 1) and standard deviation ``spread``.

    Keys ``input`` float32 [dim], ``target`` (0, 1), ``cluster`` (its number over both classes) and ``chance`` (a
    random one of the same class), int64. 1,000 samples val, 4,000 test; ``world`` draws means and samples. More training
    samples of one world begin with the fewer ones.
    """
    rng = np.random.default_rng((world, 2409))
    means = rng.standard_normal((2 * subclasses, dim))

    def drawn(count: int, seed: int) -> TensorSet:
        rng = np.random.default_rng((world, 20449, seed))
        kind = rng.integers(2 * subclasses, size=100_000)[:count]
        noise = np.random.default_rng((world, 20449, seed, 1)).standard_normal((count, dim))
        chance = np.random.default_rng((world, 20449, seed, 2)).integers(subclasses, size=count)
        target = torch.tensor(kind // subclasses)
        inputs = torch.tensor(means[kind] + spread * noise, dtype=torch.float32)
        values = {"input": inputs, "target": target, "cluster": torch.tensor(kind)}
        values["chance"] = target * subclasses + torch.tensor(chance)
        return TensorSet(torch.arange(count) + 100_000 * seed, **values)

    return Data(
        train=drawn(train, 0),
        val=drawn(1000, 1),
        test=drawn(4000, 2),
        classes=2,
        labels=["even", "odd"],
        description=f"2 classes of {subclasses} Gaussian clusters in {dim} dimensions, {train} training samples",
        licence="CC0-1.0",
    )
