"""What each divergence must give for p = (.9, .1) and q = (.5, .5), worked out by hand in float64."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

_P, _Q = [[math.log(9.0), 0.0]], [[0.0, 0.0]]
_FORWARD = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
_REVERSE = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
_VALUES: list[tuple[str, float, dict[str, float], str]] = [
    ("forward_kl", _FORWARD, {}, "0.9 ln(0.9/0.5) + 0.1 ln(0.1/0.5)"),
    ("reverse_kl", _REVERSE, {}, "0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1)"),
    ("jeffreys", _FORWARD + _REVERSE, {}, "their sum"),
    (
        "js",
        0.5 * (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3))
        + 0.5 * (0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)),
        {},
        "the mean of both KLs to m = (0.7, 0.3)",
    ),
    ("generalized_js", 0.03360, {"beta": 0.1}, "beta KL(p, m) + (1 - beta) KL(q, m), m = (0.54, 0.46)"),
    ("skew_forward_kl", 0.30714, {"alpha": 0.1}, "KL(p, m), m = (0.54, 0.46)"),
    ("skew_reverse_kl", 0.36532, {"alpha": 0.1}, "KL(q, m), m = (0.86, 0.14)"),
    ("total_variation", 0.4, {}, "(0.4 + 0.4) / 2"),
    ("adaptive_kl", 0.5 * (_FORWARD + _REVERSE), {}, "gaps 0.4 and 0.4, so w = 0.5"),
    ("hellinger", 1 - (math.sqrt(0.45) + math.sqrt(0.05)), {}, "1 - sum sqrt(p q)"),
    (
        "alpha_divergence",
        4 * (1 - (math.sqrt(0.45) + math.sqrt(0.05))),
        {"alpha": 0.5},
        "4 (1 - sum sqrt(p q))",
    ),
]

ORACLES = [
    Oracle(
        name,
        f"kd_plugin_divergences.losses:{name}",
        {"student_logits": _Q, "teacher_logits": _P},
        value=[value],
        params=params,
        source=f"closed form: {why}",
        tolerance=(2e-4, 2e-4, 5e-2),
    )
    for name, value, params, why in _VALUES
]
