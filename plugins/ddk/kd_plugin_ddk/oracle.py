"""What the loss must give, by hand: two tokens whose probabilities are simple fractions."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

LN = math.log
_FUNCTION = "kd_plugin_ddk.loss:ddk_loss"
# teacher (3/4, 1/4), student (1/2, 1/2)
FORWARD = 0.75 * LN(1.5) + 0.25 * LN(0.5)
REVERSE = 0.5 * LN(2 / 3) + 0.5 * LN(2)

ORACLES = [
    Oracle(
        "forward KL of two tokens, one masked",
        _FUNCTION,
        {
            "student_logits": [[[0.0, 0.0], [5.0, 1.0]]],
            "teacher_logits": [[[LN(3), 0.0], [0.0, 0.0]]],
            "mask": [[True, False]],
        },
        value=FORWARD,
        gradient={"student_logits": [[[0.5 - 0.75, 0.5 - 0.25], [0.0, 0.0]]]},
        source="closed form: 3/4 ln(3/2) + 1/4 ln(1/2), gradient q - p",
    ),
    Oracle(
        "T = 2 without T squared",
        _FUNCTION,
        {"student_logits": [[0.0, 0.0]], "teacher_logits": [[2 * LN(3), 0.0]]},
        value=[FORWARD],
        gradient={"student_logits": [[-0.125, 0.125]]},
        params={"temperature": 2.0},
        source="closed form: the same fractions, gradient (q - p) / T",
    ),
    Oracle(
        "reverse KL",
        _FUNCTION,
        {"student_logits": [[0.0, 0.0]], "teacher_logits": [[LN(3), 0.0]]},
        # d/dz_k sum q (ln q - ln p) = q_k (ln(q_k / p_k) - KL)
        value=[REVERSE],
        gradient={"student_logits": [[0.5 * (LN(2 / 3) - REVERSE), 0.5 * (LN(2) - REVERSE)]]},
        params={"direction": "reverse"},
        source="closed form: 1/2 ln(2/3) + 1/2 ln 2",
    ),
]
