"""What the loss must give, by hand: uniform targets and students make every logarithm a ln of a whole number."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

LN = math.log

ORACLES = [
    Oracle(
        "uniform student over 4 slots, the card's example",
        "kd_plugin_lelp.loss:lelp_loss",
        {
            "student_subclass_logits": [[[0.0, 0.0], [0.0, 0.0]]],
            "teacher_logits": [[LN(0.8), LN(0.2)]],
            "q": [[[0.5, 0.5], [0.9, 0.1]]],
        },
        value=[LN(4)],
        gradient={"student_subclass_logits": [[[0.25 - 0.4, 0.25 - 0.4], [0.25 - 0.18, 0.25 - 0.02]]]},
        source="closed form: -sum p ln(1/4) = ln 4, gradient softmax(u) - p",
    ),
    Oracle(
        "tau = 2 halves both logits and multiplies by 4",
        "kd_plugin_lelp.loss:lelp_loss",
        {
            "student_subclass_logits": [[[2 * LN(3), 0.0], [0.0, 0.0]]],
            "teacher_logits": [[2 * LN(3), 0.0]],
            "q": [[[1.0, 0.0], [0.5, 0.5]]],
        },
        # p = (3/4, 0, 1/8, 1/8), softmax(u/2) = (1/2, 1/6, 1/6, 1/6); 4 (3/4 ln 2 + 1/4 ln 6); gradient 2 (softmax - p)
        value=[3 * LN(2) + LN(6)],
        gradient={"student_subclass_logits": [[[-1 / 2, 1 / 3], [1 / 12, 1 / 12]]]},
        params={"temperature": 2.0},
        source="closed form: p = (3/4, 0, 1/8, 1/8) against (1/2, 1/6, 1/6, 1/6)",
    ),
    Oracle(
        "a subclass that the data name",
        "loss:lelp.given",
        {
            "student_subclass_logits": [[[LN(2), 0.0], [0.0, 0.0]]],
            "teacher_logits": [[LN(3), 0.0]],
            "topic": [1],
        },
        params={"key": "topic"},
        # own class one-hot on slot 1, the other class uniform: p = (0, 3/4, 1/8, 1/8); softmax(u) = (2, 1, 1, 1) / 5
        value=[LN(5)],
        gradient={"student_subclass_logits": [[[2 / 5, 1 / 5 - 3 / 4], [1 / 5 - 1 / 8, 1 / 5 - 1 / 8]]]},
        source="closed form: -ln(1/5) where every slot with a target has probability 1/5",
    ),
]
