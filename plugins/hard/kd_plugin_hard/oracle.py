"""What the two objectives must give, worked out for two classes, and with scipy for more.

The authors released no code. With teacher logits (0, 0) and student logits (a, 0), D = T^2 log cosh(a / 2T) and
dD/da = T/2 tanh(a / 2T).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import rel_entr, softmax

from kdcore.testing import Oracle

_D, _LOSS = "kd_plugin_hard.loss:disagreement", "kd_plugin_hard.loss:augmentor_loss"
_S = np.array([[0.5, -1.0, 2.0, 0.1], [1.5, 0.2, -0.3, 0.0]])
_T = np.array([[1.0, 0.0, -1.0, 2.0], [0.3, 1.7, 0.5, -0.9]])


def _cosh(a: float, temperature: float = 1.0) -> float:
    return temperature**2 * math.log(math.cosh(a / (2 * temperature)))


def _gradients(temperature: float) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Of mean KL(p || q) T^2 by student and teacher logits: T (q - p) and T p (log p/q - KL), and KL T^2 a row."""
    p, q = softmax(_T / temperature, 1), softmax(_S / temperature, 1)
    kl = rel_entr(p, q).sum(1, keepdims=True)
    student, teacher = temperature * (q - p) / 2, temperature * p * (np.log(p / q) - kl) / 2
    return student.tolist(), teacher.tolist(), (temperature**2 * kl[:, 0]).tolist()


_GS, _GT, _KL = _gradients(2.0)
_TANH = [math.tanh(a / 2) / 2 for a in (1.0, 2.0)]
_GAIN, _CHANGE = _cosh(1.0), _cosh(2.0)
_CLEAN = {"teacher_clean": [[0.0, 0.0]], "student_clean": [[0.0, 0.0]]}

ORACLES = [
    Oracle(
        "two classes, student logits (1, 0) and (2, 0)",
        _D,
        {"student": [[1.0, 0.0], [2.0, 0.0]], "teacher": [[0.0, 0.0], [0.0, 0.0]]},
        value=[_cosh(1.0), _cosh(2.0)],
        gradient={"student": [[g / 2, -g / 2] for g in _TANH]},
        source="closed form: log cosh(a / 2), gradient tanh(a / 2) / 2",
    ),
    Oracle(
        "four classes, T = 2, with the teacher's gradient",
        _D,
        {"student": _S.tolist(), "teacher": _T.tolist()},
        value=_KL,
        gradient={"student": _GS, "teacher": _GT},
        params={"temperature": 2.0},
        source="library: scipy.special.rel_entr and softmax; gradient T (q - p) and T p (log(p / q) - KL)",
    ),
    Oracle(
        "the augmentor's loss: gain log cosh(1/2), change log cosh(1)",
        _LOSS,
        {**_CLEAN, "student_view": [[1.0, 0.0]], "teacher_view": [[0.0, 0.0]]},
        value=-2.0 * math.log(_GAIN + 1e-3),
        gradient={
            "student_view": [[-2 * _TANH[0] / (_GAIN + 1e-3), 2 * _TANH[0] / (_GAIN + 1e-3)]],
        },
        params={"lam_s": 2.0, "lam_t": 0.5},
        source="closed form: -lam_s log(log cosh(a / 2) + 1e-3)",
    ),
    Oracle(
        "student equals teacher: only the change is left, and pulls the view back",
        _LOSS,
        {**_CLEAN, "student_view": [[2.0, 0.0]], "teacher_view": [[2.0, 0.0]]},
        value=0.5 * _CHANGE,
        gradient={
            "teacher_view": [[0.5 * _TANH[1], -0.5 * _TANH[1]]],
            "teacher_clean": [[0.0, 0.0]],
        },
        params={"log": False, "lam_t": 0.5},
        source="closed form: lam_t log cosh(a / 2), no gradient into the clean logits",
    ),
    Oracle(
        "student-change: from the student's own answer to the input, as a constant",
        _LOSS,
        {**_CLEAN, "student_view": [[2.0, 0.0]], "teacher_view": [[0.0, 0.0]]},
        value=-_CHANGE,
        gradient={"student_view": [[-_TANH[1], _TANH[1]]], "student_clean": [[0.0, 0.0]]},
        params={"log": False, "first_term": "student-change"},
        source="closed form: -lam_s log cosh(a / 2)",
    ),
]
