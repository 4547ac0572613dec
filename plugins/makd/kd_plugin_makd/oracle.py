"""What ``makd_loss`` must give: the authors' code run once, and one question worked out by hand."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

_FUNCTION = "kd_plugin_makd.loss:makd_loss"
_SOURCE = "taegyeong-lee/MaKD-Multi-aspect-knowledge-distillation-with-Large-Language-Model@582f837"

ORACLES = [
    Oracle(
        "three questions, two images",
        "loss:makd",
        {
            "student_aspects": [[0.5, -1.0, 2.0], [1.5, 0.2, -0.3]],
            "aspects": [[0.9, 0.2, 0.5], [0.05, 1.0, 0.0]],
        },
        value=[0.72142223, 0.92630246],
        gradient={
            "student_aspects": [
                [-0.046256778, 0.011490237, 0.06346618],
                [0.127929079, -0.075027667, 0.070926247],
            ]
        },
        source=f"{_SOURCE}: mdistiller/distillers/MaKD.py, makd_loss",
        tolerance=(1e-6, 1e-5, 5e-2),
    ),
    Oracle(
        "one question, answered yes for sure",
        _FUNCTION,
        {"student_aspects": [[0.0], [math.log(3)]], "aspects": [[1.0], [1.0]]},
        value=[math.log(2), math.log(4 / 3)],
        gradient={"student_aspects": [[-0.25], [-0.125]]},
        source="closed form: BCE = ln(1 + exp(-z)), gradient (sigmoid(z) - 1) / B",
    ),
]
