"""Mixup of a batch, or of a share of it, with a coefficient for each sample."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import Augmentation, Batch, InputError

Share = Annotated[float, Field(ge=0, le=1)]
Variant = Literal["paper", "released"]


def draw_pairs(
    count: int,
    rng: np.random.Generator,
    *,
    unmixed: float = 0.9,
    beta: float = 1.0,
    variant: Variant = "paper",
) -> tuple[Tensor, Tensor, Tensor]:
    """(r1, r2, lambda): two permutations of ``count`` samples, and Beta(beta, beta) a pair [count] in [0, 1].

    A share ``unmixed`` of the lambdas is 1 (partial mixup; 0 is full mixup): int(unmixed * count) of them.
    ``released`` draws which with replacement, so fewer are: of 64 at 0.9, 59 % on average and not 89 %.
    """
    lam, chosen = rng.beta(beta, beta, count), int(unmixed * count)
    lam[rng.integers(0, count, chosen) if variant == "released" else rng.permutation(count)[:chosen]] = 1.0
    first, second = (torch.from_numpy(rng.permutation(count)) for _ in range(2))
    return first, second, torch.from_numpy(lam)


def mix(values: Tensor, first: Tensor, second: Tensor, lam: Tensor) -> Tensor:
    """lambda_i v[r1(i)] + (1 - lambda_i) v[r2(i)], floating [B, ...]; where lambda is 1, v[r1(i)] bit for bit."""
    lam = lam.to(values).view(-1, *[1] * (values.dim() - 1))
    return lam * values[first] + (1 - lam) * values[second]


def soft_labels(target: Tensor, classes: int) -> Tensor:
    """Float [B, classes] that sum to 1: one-hot of int64 [B] (``classes`` of them), soft labels as they are."""
    return target if target.is_floating_point() else F.one_hot(target, classes).float()


class PartialMixup(Augmentation):
    """Mixes ``inputs`` and makes ``target`` soft labels [B, C]; everything else of a sample is its first image's.

    ``unmixed`` is the share that is *not* mixed: 0.9 is "10 % mixup", 0 full mixup, 1 none. ``variant``, ``beta``:
    see ``draw_pairs``. ``classes`` where the data source does not say how many there are. Pairs come from the
    batch of this process; of several streams each is mixed by itself, and one without labels in its inputs alone.
    """

    changes_labels = True

    def __init__(
        self,
        *,
        unmixed: Share = 0.9,
        beta: Annotated[float, Field(gt=0)] = 1.0,
        variant: Variant = "paper",
        inputs: list[str] = ["input"],  # noqa: B006 - read only; the schema shows the default
        classes: Annotated[int, Field(gt=1)] | None = None,
    ) -> None:
        super().__init__()
        self.unmixed, self.beta, self.variant = unmixed, beta, variant
        self.inputs, self.classes = inputs, classes

    def setup(self) -> None:
        self.classes = self.classes or self.run.source.data.classes
        if self.classes is None:
            raise InputError(
                "augmentation.classes",
                "soft labels need the number of classes",
                hint="give classes, or set Data.classes",
            )

    def forward(self, batch: Batch) -> Batch:
        if batch.parts:
            return Batch(parts={name: self._mixed(part, name) for name, part in batch.parts.items()})
        return self._mixed(batch, "main")

    def _mixed(self, batch: Batch, stream: str) -> Batch:
        seed = torch.randint(2**62, (), generator=self.run.rng(f"mix-kd.{stream}", shared=False)).item()
        first, second, lam = draw_pairs(
            len(batch),
            np.random.default_rng(int(seed)),
            unmixed=self.unmixed,
            beta=self.beta,
            variant=self.variant,
        )
        device = batch["id"].device
        pairs = first.to(device), second.to(device), lam.to(device)
        mixed = batch.rows(pairs[0])
        for name in self.inputs:
            if not batch[name].is_floating_point():
                problem = f"{name!r} is {batch[name].dtype}: only floating inputs can be mixed"
                raise InputError("augmentation.inputs", problem)
            mixed[name] = mix(batch[name], *pairs)
        if "target" in batch:
            assert self.classes is not None
            mixed["target"] = mix(soft_labels(batch["target"], self.classes), *pairs)
        return mixed

    def extra_repr(self) -> str:
        return f"unmixed={self.unmixed}, beta={self.beta}, {self.variant}"
