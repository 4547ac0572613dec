"""The demonstration's oracle: yes/no questions about an 8x8 digit, answered by measuring the image, never its label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcore import Batch, InputError
from kdcore.data import key_seed

Array = np.ndarray[Any, Any]
INK = 0.35  # a pixel at least this dark is ink
SHARPNESS = 4.0  # of the sigmoid about each threshold
NOISE = 1.0  # standard deviation of what is added to a logit: this oracle errs


def holes(image: Array) -> list[Array]:
    """The pixels [n,2] of each closed hole: paper that cannot be reached from the border in steps of one pixel."""
    from scipy.ndimage import label

    paper = np.pad(image < INK, 1, constant_values=True)
    regions, count = label(paper)
    return [np.argwhere(regions == r) - 1 for r in range(1, count + 1) if r != regions[0, 0]]


def _centre(image: Array, axis: int) -> float:
    ink = image.sum(1 - axis)
    return float((ink * np.arange(8)).sum() / ink.sum()) - 3.5


def _likeness(image: Array, other: Array) -> float:
    """The cosine of an image and its mirror image."""
    return float((image * other).sum() / (image**2).sum())


def _strokes(line: Array) -> int:
    """How many separate runs of ink a line crosses."""
    ink = np.concatenate([[False], line >= INK])
    return int((ink[1:] & ~ink[:-1]).sum())


def _width(image: Array) -> int:
    columns = np.flatnonzero((image >= INK).any(0))
    return int(columns[-1] - columns[0] + 1) if len(columns) else 0


def _hole_at(image: Array, low: float, high: float) -> float:
    return float(any(low <= hole[:, 0].mean() < high for hole in holes(image)))


# question -> a measure that is above 0 where the answer is yes, in steps of about 1
QUESTIONS: dict[str, Callable[[Array], float]] = {
    "Is there a closed hole?": lambda x: 2.0 * bool(holes(x)) - 1,
    "Is there a closed hole in the upper half?": lambda x: 2 * _hole_at(x, 0.0, 3.5) - 1,
    "Is there a closed hole in the lower half?": lambda x: 2 * _hole_at(x, 3.5, 8.0) - 1,
    "Is most of the ink in the upper half?": lambda x: -2 * _centre(x, 0),
    "Is most of the ink in the right half?": lambda x: 2 * _centre(x, 1),
    "Does the left half mirror the right half?": lambda x: 5 * (_likeness(x, x[:, ::-1]) - 0.75),
    "Does the upper half mirror the lower half?": lambda x: 5 * (_likeness(x, x[::-1]) - 0.75),
    "Is it at least five pixels wide?": lambda x: _width(x) - 4.5,
    "Does a line through the middle cross more than one stroke?": lambda x: _strokes(x[4]) - 1.5,
    "Does a line through the upper part cross more than one stroke?": lambda x: _strokes(x[2]) - 1.5,
    "Does a line from top to bottom cross more than two strokes?": lambda x: _strokes(x[:, 4]) - 2.5,
    "Is there ink at the left of the bottom row?": lambda x: 2 * (float(x[7, :3].max()) - INK),
}


def look(batch: Batch, questions: Sequence[str]) -> Tensor:
    """p [B,Q] of ``input`` [B,1,8,8] or [B,64] in [0, 1]: sigmoid(SHARPNESS * measure + noise), the noise by the id."""
    if unknown := [q for q in questions if q not in QUESTIONS]:
        raise InputError(
            "stage.questions", "this oracle cannot answer", given=unknown, allowed=list(QUESTIONS)
        )
    images = batch["input"].reshape(-1, 8, 8).double().numpy()
    logits = [[SHARPNESS * QUESTIONS[q](image) for q in questions] for image in images]
    noise = [
        np.random.default_rng(key_seed("makd", int(i))).normal(0, NOISE, len(questions)) for i in batch["id"]
    ]
    return torch.sigmoid(torch.tensor(np.array(logits) + np.array(noise), dtype=torch.float32))
