"""What geometry and objective must give: the authors' code run once in float64, numbers worked by hand, and scipy."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_softmax, rel_entr, softmax

from kdcore.testing import Oracle

_GEOMETRY, _LOSS = "kd_plugin_tgeo_kd.geometry:trilateral", "kd_plugin_tgeo_kd.loss:fused_loss"


def wave(phase: float, *shape: int) -> np.ndarray:
    """2 sin(1.7 i + phase): the logits whose probabilities the authors' code was run on."""
    return np.array([2 * math.sin(1.7 * i + phase) for i in range(math.prod(shape))]).reshape(shape)


# Of four samples of the classes 0, 2, 1, 0, the first two: Tbar of class 0 is the mean of the first and the last.
_S, _T = softmax(wave(0.0, 4, 3), 1), softmax(wave(1.0, 4, 3), 1)
_AUTHORS = [  # S, T, G, Tbar, (Tbar-S)^2, (G-S)^2, (T-S)^2, (T-G)^2, (Tbar-G)^2
    [
        *(0.112780960578863, 0.819567823269368, 0.0676512161517694),
        *(0.682804733809297, 0.298278231804204, 0.0189170343864983),
        *(1.0, 0.0, 0.0),
        *(0.373858722081336, 0.171204858964124, 0.45493641895454),
        *(0.0681615975511422, 0.420374533482683, 0.149989828309983),
        *(0.787157623911365, 0.67169141693849, 0.00457668704681342),
        *(0.324927102047862, 0.271742838169917, 0.00237502047233048),
        *(0.100612836893791, 0.0889699035682427, 0.000357854189979961),
        *(0.392052899913618, 0.0293111037329256, 0.206967145291181),
    ],
    [
        *(0.0201735987677448, 0.345236891968101, 0.634589509264154),
        *(0.077853945982453, 0.825712197214147, 0.0964338568034004),
        *(0.0, 0.0, 1.0),
        *(0.077853945982453, 0.825712197214147, 0.0964338568034004),
        *(0.0033270224548093, 0.230856518951281, 0.28961150627546),
        *(0.000406974087241953, 0.119188511575794, 0.133524826739811),
        *(0.0033270224548093, 0.230856518951281, 0.28961150627546),
        *(0.00606123690503871, 0.681800632628214, 0.816431775131178),
        *(0.00606123690503871, 0.681800632628214, 0.816431775131178),
    ],
]

_ALPHA, _TARGET, _TAU = np.array([0.2, 0.9, 0.5]), np.array([2, 0, 1]), 4.0
_ZS, _ZT = wave(0.3, 3, 4), wave(1.1, 3, 4)


def _fused() -> tuple[list[float], list[list[float]], list[float]]:
    """Each sample's objective, and the gradient of their mean by student logits and by alpha."""
    p, q = softmax(_ZT / _TAU, 1), softmax(_ZS / _TAU, 1)
    kd = _TAU**2 * rel_entr(p, q).sum(1)
    gt = -log_softmax(_ZS, 1)[np.arange(3), _TARGET]
    by_logits = _ALPHA[:, None] * _TAU * (q - p) + (1 - _ALPHA)[:, None] * (
        softmax(_ZS, 1) - np.eye(4)[_TARGET]
    )
    value = _ALPHA * kd + (1 - _ALPHA) * gt
    return value.tolist(), (by_logits / 3).tolist(), ((kd - gt) / 3).tolist()


_VALUE, _BY_LOGITS, _BY_ALPHA = _fused()

ORACLES = [
    Oracle(
        "released geometry of two samples",
        _GEOMETRY,
        {
            "S": _S[:2].tolist(),
            "T": _T[:2].tolist(),
            "Tbar": [_T[[0, 3]].mean(0).tolist(), _T[1].tolist()],
            "G": [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
        },
        value=_AUTHORS,
        params={"squared": True},
        source="Chengming0501/TGeo-KD@5a69cbe src/fusion_ratio_bilevel.py, state_design",
    ),
    Oracle(
        "the paper's edges of two classes",
        _GEOMETRY,
        {"S": [[0.6, 0.4]], "T": [[0.9, 0.1]], "Tbar": [[0.8, 0.2]], "G": [[1.0, 0.0]]},
        value=[
            [
                *(0.4, -0.4, 0.1, -0.1, 0.3, -0.3, 0.2, -0.2, 0.2, -0.2),
                *(0.6, 0.4, 0.9, 0.1, 0.8, 0.2, 1.0, 0.0),
            ]
        ],
        source="closed form: differences of probabilities, worked by hand",
    ),
    Oracle(
        "the fused objective, tau = 4, with the ratio's gradient",
        _LOSS,
        {
            "student_logits": _ZS.tolist(),
            "teacher_logits": _ZT.tolist(),
            "target": _TARGET.tolist(),
            "alpha": _ALPHA.tolist(),
        },
        value=_VALUE,
        gradient={"student_logits": _BY_LOGITS, "alpha": _BY_ALPHA},
        params={"temperature": _TAU},
        source="library: scipy.special.rel_entr, softmax; gradient alpha tau (q - p) + (1 - alpha)(S - G)",
    ),
]
