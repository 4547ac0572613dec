"""What TRG's terms must give: the formulas in Python floats, their gradients by central differences; small cases by hand."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

_GRAPH = "kd_plugin_trg.graph"
_SOURCE = "brute force: the paper's formula in Python floats, gradient by central differences of 1e-6"
_S = [[0.5, -1.0, 0.2], [1.1, 0.3, -0.4], [-0.6, 0.8, 0.1], [0.2, 0.1, 0.9], [-0.9, -0.5, 0.4]]
_T = [[0.3, 0.7], [1.2, -0.4], [-0.5, 0.2], [0.9, 0.8], [-0.1, -1.1]]
_STRICT = (1e-6, 1e-4, 5e-2)


def _ring(k: int) -> float:
    """-log of the right one's share among 4 where it alone has similarity 1, and the others 0, at tau = 1 / k."""
    return math.log(1 + 3 * math.exp(-k))


ORACLES = [
    Oracle(
        "local, k = 2",
        f"{_GRAPH}:local_loss",
        {"student_tokens": _S, "teacher_tokens": _T},
        value=[0.032430319117, 0.020708607867, 0.059672988955, 0.058263785401, 0.009024523771],
        gradient={
            "student_tokens": [
                [-0.000197694, -0.008808494, -0.00937726],
                [0.000905775, -0.002513307, -0.001928819],
                [0.012696449, -0.008642481, 0.011749154],
                [-0.025092001, 0.020204454, -0.0032536],
                [0.011687472, -0.000240172, 0.002810525],
            ]
        },
        params={"k": 2},
        source=_SOURCE,
        tolerance=_STRICT,
    ),
    Oracle(
        "local, k = 3, sigma = 0.5",
        f"{_GRAPH}:local_loss",
        {"student_tokens": _S, "teacher_tokens": _T},
        value=[0.030001011404, 0.003975582598, 0.016141900798, 0.032175793242, 0.004534411996],
        params={"k": 3, "sigma": 0.5},
        source=_SOURCE,
        tolerance=_STRICT,
    ),
    Oracle(
        "global, tau = 0.5",
        f"{_GRAPH}:global_loss",
        {
            "student_tokens": [[0.4, 0.9], [1.0, 0.2], [-0.7, 0.1], [-0.3, 0.6], [0.2, -0.8]],
            "teacher_tokens": _T,
        },
        value=[0.763853395734, 0.981947494052, 0.242009910582, 1.803010084574, 0.457682113857],
        gradient={
            "student_tokens": [
                [0.07008969, -0.031150974],
                [-0.049018701, 0.245093506],
                [-0.005347119, -0.037429831],
                [-0.435757782, -0.217878891],
                [0.178189606, 0.044547401],
            ]
        },
        params={"tau": 0.5},
        source=_SOURCE,
        tolerance=_STRICT,
    ),
    Oracle(
        "global, aligned orthonormal tokens, tau = 0.25",
        f"{_GRAPH}:global_loss",
        {
            f"{side}_tokens": [[float(i == j) for j in range(4)] for i in range(4)]
            for side in ("student", "teacher")
        },
        value=[_ring(4)] * 4,
        params={"tau": 0.25},
        source="closed form: log(1 + 3 exp(-1 / tau))",
    ),
    Oracle(
        "context of two images of three tokens",
        f"{_GRAPH}:contextual_loss",
        {"student_tokens": [_S[:3], _S[2:]], "teacher_tokens": [_T[:3], _T[2:]]},
        value=[0.011654471812, 0.014565780966],
        gradient={
            "student_tokens": [
                [
                    [0.00568295, -0.009359115, 0.000688934],
                    [-0.005180451, -0.001041286, 0.00186116],
                    [-0.005447954, 0.00961746, -0.00045372],
                ],
                [
                    [-0.001217738, 0.001294315, 0.001841173],
                    [-0.008906501, -0.002995895, -0.007625811],
                    [0.007387746, 0.004647717, 0.002836289],
                ],
            ]
        },
        source=_SOURCE,
        tolerance=_STRICT,
    ),
]
