"""What the losses must give: the authors' code run once, and the intended weighing worked out with numpy and scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import expit, log_softmax, logsumexp, softmax
from scipy.stats import entropy

from kdcore.testing import Oracle

AUTHORS = "raojay7/DCD@fbb5ff0 meter/modules/KD_loss.py"
ALPHA = 0.2


def wave(rows: int, columns: int, phase: float, scale: float) -> list[list[float]]:
    return [[scale * math.sin(1.7 * (columns * r + c) + phase) for c in range(columns)] for r in range(rows)]


Y, Z = wave(3, 5, 1.0, 2.0), wave(3, 5, 3.0, 3.0)
SCORES: dict[str, Any] = {"student_logits": Y, "teacher_logits": Z, "target": [0, 0, 0]}


def _worked(y: Any, z: Any, e: Any, r: Any) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """Terms [B] (times B) and the gradient at y, the match in column 0."""
    y, z, e, r = (np.asarray(each, dtype=float) for each in (y, z, e, r))
    hit = np.eye(y.shape[1])[[0] * len(y)]
    bce = np.logaddexp(0, y) - hit * y
    terms = {
        "match": ALPHA * len(y) * r * ((z - y) ** 2).mean(1),
        "labels": (1 - ALPHA) * len(y) * e * bce.mean(1),
    }
    slope = ALPHA * r[:, None] * 2 * (y - z) + (1 - ALPHA) * e[:, None] * (expit(y) - hit)
    return {n: v.tolist() for n, v in terms.items()}, {"student_logits": (slope / y.shape[1]).tolist()}


def _weights(z: Any) -> tuple[Any, Any]:
    bits = entropy(softmax(np.asarray(z), 1), axis=1)
    e = bits / bits.sum()
    return e, softmax((1 - e) ** 2)


def _lagging() -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    y, z = np.asarray(Y), np.asarray(Z)
    hit = np.eye(5)[[0, 0, 0]]
    mine, theirs = (logsumexp(s, 1) - s[:, 0] for s in (y, z))
    w = 1 - np.exp(-mine / theirs)
    slope = ALPHA * w[:, None] * 2 * (y - z) / 5 + np.exp(log_softmax(y, 1)) - hit
    terms = {"match": (ALPHA * w * ((z - y) ** 2).mean(1)).tolist(), "labels": mine.tolist()}
    return terms, {"student_logits": (slope / 3).tolist()}


_TWO = [[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]
_E, _R = (0.3451490, 0.6548510), (0.5768121, 0.4231879)
_PAPER, _PLAIN = _worked(Y, Z, *_weights(Z)), _worked(Y, Z, [1 / 3] * 3, [1 / 3] * 3)
_EXAMPLE, _WSL = _worked(*_TWO, _E, _R), _lagging()

ORACLES = [
    Oracle(
        "authors' distillation_loss, T = 1 and 4",  # the same numbers: T cancels
        of="loss:dcd",
        tensors=SCORES,
        params={"variant": "released"},
        value={"match": 0.2 * 7.0501015909253715, "labels": 0.8 * 0.936327847899495},
        gradient={
            "student_logits": [
                [-0.03891963733, 0.03929193298, -0.05493698933, 0.03583904569, 0.16812444838],
                [-0.09096614094, -0.09288832252, 0.09491399250, 0.15642476021, 0.05364401412],
                [-0.17382459570, 0.02120370602, 0.05660814763, -0.03565595817, 0.08419024509],
            ]
        },
        source=f"{AUTHORS}, distillation_loss",
    ),
    Oracle(
        "authors' WSLDistiller",
        of="loss:dcd.wsl",
        tensors=SCORES,
        params={"variant": "released"},
        value={"match": 0.2 * 7.007212027325529, "labels": 2.3655687807791623},
        gradient={
            "student_logits": [
                [-0.25333793057, 0.06058279312, -0.05659351838, 0.03400723150, 0.28647375548],
                [-0.36375866678, -0.09389360426, 0.12832740791, 0.32527531693, 0.05184348805],
                [-0.44350572338, 0.14451067305, 0.12691268470, -0.03826950509, 0.08167449584],
            ]
        },
        source=f"{AUTHORS}, WSLDistiller",
    ),
    Oracle(
        "a weight a sample",
        of="loss:dcd",
        tensors=SCORES,
        value=_PAPER[0],
        gradient=_PAPER[1],
        source="brute force: scipy's entropy and softmax, float64",
    ),
    Oracle(
        "no weights",
        of="loss:dcd",
        tensors=SCORES,
        params={"weighing": "none"},
        value=_PLAIN[0],
        gradient=_PLAIN[1],
        source="brute force: numpy, float64",
    ),
    Oracle(
        "two candidates",
        of="loss:dcd",
        tensors={"student_logits": _TWO[0], "teacher_logits": _TWO[1], "target": [0, 0]},
        value=_EXAMPLE[0],
        gradient=_EXAMPLE[1],
        source="closed form: entropies ln 2 and 0.365334 of softmax (0, 0) and (2, 0)",
    ),
    Oracle(
        "the student's lag as weight",
        of="loss:dcd.wsl",
        tensors=SCORES,
        value=_WSL[0],
        gradient=_WSL[1],
        source="brute force: numpy and scipy, float64",
        tolerance=(1e-6, 1e-4, 1e-1),
    ),
]
