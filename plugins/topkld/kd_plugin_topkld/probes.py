"""What quantisation costs and does: the student's bits, and how its samples look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_topkld.quantiser import model_bits
from kd_plugin_topkld.tokens import CLASSES, LENGTH, VALUES
from kdcore import Batch, Probe
from kdcore.functional import forward_kl

Count = Annotated[int, Field(gt=0)]


class Bits(Probe):
    """Weights, how many of them are quantised, and the bits of all: others count ``rest`` bits, scales 16."""

    def __init__(self, *, rest: Annotated[int, Field(gt=0)] = 16) -> None:
        self.rest = rest

    def measure(self, run: Any, models: Mapping[str, nn.Module], data: Any) -> dict[str, Any]:
        found = model_bits(models["student"], self.rest)
        return {**found._asdict(), "bits_per_weight": found.bits / found.weights}


class Samples(Probe):
    """Of a class-conditional model of token rasters (``kd_plugin_topkld.tokens``): ``count`` samples, all classes alike.

    ``frechet_distance`` of their token vectors to those of the test split, ``class_accuracy``: how often a logistic
    regression on the training split's tokens finds the class that was asked for; ``kl_loss``: KL(p || q) a token, of
    the test split. Each token is drawn from the ``k`` most probable.
    """

    def __init__(self, *, count: Count = 1000, k: Count = 5, seed: int = 0) -> None:
        self.count, self.k, self.seed = count, k, seed

    def measure(self, run: Any, models: Mapping[str, nn.Module], data: Any) -> dict[str, Any]:
        student, device = models["student"], run.device
        classes = torch.arange(self.count) % CLASSES
        drawn = sampled(student, classes, self.k, torch.Generator().manual_seed(self.seed), device)
        train, test = (_all(data, part) for part in ("train", "test"))
        found = {
            "frechet_distance": frechet(drawn.numpy(), test["target"].numpy()),
            "class_accuracy": _accuracy(train, drawn, classes),
        }
        teacher = next((model for name, model in models.items() if name != "student"), None)
        if teacher is not None:
            batch = test.to(device)
            kl = forward_kl(student(batch)["logits"], teacher(batch)["logits"])
            found["kl_loss"] = kl.mean().item()
        return found


@torch.no_grad()
def sampled(
    model: nn.Module, classes: Tensor, k: int, generator: torch.Generator, device: Any = "cpu"
) -> Tensor:
    """Tokens int64 [n,16] of these classes [n], each drawn from the model's ``k`` most probable."""
    ids = torch.zeros(len(classes), LENGTH + 1, dtype=torch.int64)
    ids[:, 0] = VALUES + classes
    for at in range(LENGTH):
        batch = Batch({"id": torch.arange(len(ids)), "input": ids[:, :LENGTH]}).to(device)
        best = model(batch)["logits"][:, at].float().cpu().topk(k)
        chosen = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
        ids[:, at + 1] = best.indices.gather(1, chosen).squeeze(1)
    return ids[:, 1:]


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The squared Frechet distance of Gaussians fitted to rows x [n,d] and y [m,d]: FID without a feature network."""
    from scipy.linalg import sqrtm

    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    cross = sqrtm(sqrtm(a) @ b @ sqrtm(a))
    return float(gap @ gap + np.trace(a + b - 2 * np.real(cross)))


def _all(data: Any, part: str) -> Batch:
    batches = list(data.loader(part))
    return Batch({key: torch.cat([each[key] for each in batches]) for key in batches[0]})


def _accuracy(train: Batch, tokens: Tensor, classes: Tensor) -> float:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=2000).fit(
        train["target"].numpy() / 16, train["input"][:, 0].numpy() - VALUES
    )
    return float(fitted.score(tokens.numpy() / 16, classes.numpy()))
