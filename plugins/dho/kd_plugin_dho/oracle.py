"""What the loss must give: the authors' code run once on fixed tensors, and the paper's formula by hand."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

AUTHORS = "erjui/DHO@846de75 train_others.py, train_student: distill_loss_labeled"


def wave(rows: int, columns: int, phase: float) -> list[list[float]]:
    return [[2 * math.sin(1.7 * (columns * r + c) + phase) for c in range(columns)] for r in range(rows)]


ORACLES = [
    Oracle(
        "authors' batch mean",
        of="kd_plugin_dho.loss:dho_loss",
        tensors={"student_z_kd": wave(3, 4, 1.0), "teacher_logits": wave(3, 4, 3.0)},
        value=2.373711186459899,
        gradient={
            "student_z_kd": [
                [0.15949773503095616, 0.15505898264523, -0.0911044050640441, -0.22345231261214213],
                [0.24195903437496374, 0.05861012614889271, -0.19576942047328438, -0.10479974005057198],
                [0.22792520749222717, -0.013094793335972448, -0.2845720619293996, 0.06974164777314493],
            ]
        },
        source=AUTHORS,
    ),
    Oracle(
        "two classes, T = 2",
        of="loss:dho",
        tensors={"student_z_kd": [[0.0, 0.0]], "teacher_logits": [[2.0, 0.0]]},
        params={"variant": "released"},
        # p = sigmoid(1); 4 (p ln 2p + (1-p) ln 2(1-p)); gradient T (1/2 - p)
        value=0.4437762866869094,
        gradient={"student_z_kd": [[-0.46211715726, 0.46211715726]]},
        source="closed form: binary divergence from the uniform distribution",
    ),
]
