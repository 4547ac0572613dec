"""The demonstration's data and CLIP: few labelled digits, and captions that neglect the visual detail."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_sgva_clip.clip import TwoTowers
from kdcore import Data, InputError
from kdcore.datasets import TensorSet

PAIRS = ((0, 6), (1, 7), (2, 8), (3, 5), (4, 9))  # the digits that captions take for each other
CAPTIONED, VAL = 700, 200
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Noisy(TensorSet):
    """Digits [64] with fresh Gaussian noise: ``input`` and ``support`` are two views of the same image."""

    spread = 0.0

    def augment(self, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        views = item["input"] + self.spread * torch.tensor(rng.standard_normal((2, 64)), dtype=torch.float32)
        return {**item, "input": views[0], "support": views[1]}


def few_shots(
    *,
    shots: Count = 4,
    tune_shots: Count = 4,
    noise: Annotated[float, Field(ge=0)] = 0.05,
    captions: bool = False,
    neglect: Share = 0.45,
    split_seed: int = 0,
) -> Data:
    """scikit-learn's digits [64] in [0, 1], split by ``split_seed``: 700 captioned, 200 val, few shots, the rest test.

    ``shots`` a class train and ``tune_shots`` a class tune, both labelled rightly; in training ``input`` and
    ``support`` are two views with noise of standard deviation ``noise``. With ``captions`` the training data are the
    700 images that CLIP was trained on, whose captions name the partner in PAIRS with probability ``neglect``.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    inputs = torch.tensor(raw.data / 16.0, dtype=torch.float32)
    target = torch.tensor(raw.target, dtype=torch.int64)
    rng = np.random.default_rng((split_seed, 2211))
    captioned, val, rest = torch.tensor(rng.permutation(len(target))).split(
        [CAPTIONED, VAL, len(target) - CAPTIONED - VAL]
    )
    by_class = [rest[target[rest] == c] for c in range(10)]
    if shots + tune_shots >= min(map(len, by_class)):
        raise InputError("data.args.shots", "leaves nothing to test on", given=shots + tune_shots)
    few = torch.cat([ids[:shots] for ids in by_class])
    tune = torch.cat([ids[shots : shots + tune_shots] for ids in by_class])
    test = rest[~torch.isin(rest, torch.cat([few, tune]))]

    def part(ids: Tensor, of: type[TensorSet] = TensorSet) -> TensorSet:
        return of(ids, input=inputs[ids], target=target[ids])

    train = part(few, Noisy)
    train.spread = noise  # type: ignore[attr-defined] # Noisy's
    if captions:
        told = _told(target[captioned], neglect, rng)
        train = TensorSet(captioned, input=inputs[captioned], target=told)
    return Data(
        train=train,
        val=part(val),
        test=part(test),
        tune=part(tune),
        classes=10,
        labels=[str(c) for c in range(10)],
        preprocessing=[{"step": "scale", "factor": 1 / 16}],
        raw=lambda ids: {"input": raw.data[list(ids)].astype("float32")},
        description=f"scikit-learn digits, {len(train)} training images",
        licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )


def _told(target: Tensor, neglect: float, rng: np.random.Generator) -> Tensor:
    """What captions name: the class, or its partner."""
    partner = torch.arange(10)
    for a, b in PAIRS:
        partner[a], partner[b] = b, a
    return torch.where(torch.tensor(rng.random(len(target)) < neglect), partner[target], target)


class Prompted(nn.Module):
    """A toy text side, [C,De]: a tower of two layers over class name + context, a vector that all classes share."""

    def __init__(self, classes: int, width: int, embedding: int) -> None:
        super().__init__()
        self.names = nn.Parameter(torch.randn(classes, width))
        self.context = nn.Parameter(torch.zeros(width))
        self.tower = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embedding))

    def forward(self) -> Tensor:
        embeddings: Tensor = self.tower(self.names + self.context)
        return embeddings


def toy_clip(
    *,
    inputs: Count = 64,
    hidden: Count = 96,
    features: Count = 48,
    embedding: Count = 32,
    classes: Count = 10,
    scale: Annotated[float, Field(gt=0)] = math.exp(2.5),
) -> TwoTowers:
    """An encoder ``inputs``-``hidden``-``features`` with ReLU and its projection, beside ``Prompted`` class names.

    ``features`` over ``embedding`` is 1.5 as in CLIP ViT-B/16 (768 to 512).
    """
    encoder = nn.Sequential()
    for name, (wide, narrow) in {"first": (inputs, hidden), "second": (hidden, features)}.items():
        encoder.add_module(name, nn.Sequential(nn.Linear(wide, narrow), nn.ReLU()))
    encoder.add_module("projection", nn.Linear(features, embedding, bias=False))
    return TwoTowers(encoder, Prompted(classes, features, embedding), projection="projection", scale=scale)
