"""What ``taid_loss`` must give: the authors' code run once, and two classes worked out by hand."""

from __future__ import annotations

from kdcore.testing import Oracle

_FUNCTION = "kd_plugin_taid.loss:taid_loss"

ORACLES = [
    Oracle(
        "released, t = 0.3, one token",
        _FUNCTION,
        {"student_logits": [[0.5, -1.0, 2.0, 0.1]], "teacher_logits": [[1.0, 0.0, -1.0, 2.0]]},
        value=[1.448137],
        gradient={"student_logits": [[-0.1030326, -0.0323744, 0.2954031, -0.1599961]]},
        params={"t": 0.3, "variant": "released"},
        source="SakanaAI/TAID@a062892: TAID.compute_loss of one token",
        tolerance=(1e-6, 1e-5, 5e-2),
    ),
    Oracle(
        "two classes, t = 0.5",
        _FUNCTION,
        {"student_logits": [[0.0, 0.0]], "teacher_logits": [[2.0, 0.0]]},
        value=[0.110944],
        gradient={"student_logits": [[-0.2310586, 0.2310586]]},
        params={"t": 0.5},
        source="closed form: p_t = (0.7310586, 0.2689414), KL = ln 2 - H(p_t), gradient 0.5 - p_t",
        tolerance=(1e-5, 1e-5, 5e-2),
    ),
]
