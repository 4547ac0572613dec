"""The demonstration's data: classes in superclasses, a pool with a long tail, a teacher that is biased inside them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kdcore import Data
from kdcore.datasets import TensorSet

WIDTH, CLOSE = 32, 0.8  # dimensions; spread of the classes about their superclass
Count = Annotated[int, Field(gt=0)]
Spread = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def centres(split_seed: int, supers: int, each: int) -> tuple[Tensor, Tensor, np.random.Generator]:
    """The superclasses' centres [C,32], a row a class, the classes' offsets from them [C,32], and what comes next."""
    rng = np.random.default_rng((split_seed, 2506))
    middle = torch.tensor(rng.standard_normal((supers, WIDTH))).repeat_interleave(each, 0)
    return middle, CLOSE * torch.tensor(rng.standard_normal((supers * each, WIDTH))), rng


def structured_pool(
    *,
    supers: Count = 10,
    each: Count = 3,
    size: Count = 3000,
    tail: Annotated[float, Field(ge=0)] = 3.0,
    noise: Spread = 1.3,
    test: Count = 1500,
    split_seed: int = 0,
) -> Data:
    """``supers`` superclasses of ``each`` classes, Gaussian of spread ``noise`` in 32 dimensions: ``input``, ``target``.

    The pool of ``size`` has a long tail: class of rank r of C has a share exp(-``tail`` r / C); val (300) and test are
    balanced. Train is two streams over the pool: ``labelled``, with targets and a ``start`` that is true for one
    sample a class, and ``unlabelled``, without. Which class has which rank is drawn.
    """
    middle, offset, rng = centres(split_seed, supers, each)
    classes, means = supers * each, middle + offset
    share = np.exp(-tail * rng.permutation(classes) / classes)
    pool = np.concatenate([np.arange(classes), rng.choice(classes, size - classes, p=share / share.sum())])

    def samples(target: np.ndarray, first: int) -> TensorSet:
        y = torch.tensor(target)
        x = means[y] + noise * torch.tensor(rng.standard_normal((len(y), WIDTH)))
        return TensorSet(torch.arange(first, first + len(y)), input=x.float(), target=y)

    train = samples(rng.permutation(pool), 0)
    values = train.values
    start = torch.stack([(values["target"] == c).nonzero()[0, 0] for c in range(classes)])
    values["start"] = torch.isin(values["id"], start)
    return Data(
        train={"labelled": train, "unlabelled": TensorSet(values["id"], input=values["input"])},
        val=samples(np.arange(300) % classes, size),
        test=samples(np.arange(test) % classes, size + 300),
        classes=classes,
        description=f"{classes} Gaussian classes in {supers} superclasses, a pool of {size} with a long tail",
    )


class BiasedTeacher(nn.Module):
    """Knows the superclass and mistakes the classes inside it: log-likelihoods under wrong offsets, [B,C]."""

    means: Tensor

    def __init__(self, means: Tensor, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.register_buffer("means", means)

    def forward(self, x: Tensor) -> Tensor:
        return -(x.unsqueeze(1) - self.means).square().sum(-1) / (2 * self.noise**2)


def biased_teacher(
    *, supers: Count = 10, each: Count = 3, noise: Spread = 1.3, right: Share = 0.5, split_seed: int = 0
) -> BiasedTeacher:
    """A teacher whose class offsets are ``right`` times the true ones plus others of the variance that is left."""
    middle, offset, _ = centres(split_seed, supers, each)
    other = CLOSE * torch.tensor(np.random.default_rng((split_seed, 910)).standard_normal(offset.shape))
    return BiasedTeacher((middle + right * offset + (1 - right**2) ** 0.5 * other).float(), noise)
