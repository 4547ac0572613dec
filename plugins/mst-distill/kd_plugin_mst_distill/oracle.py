"""What the loss must give: the authors' code run once on fixed tensors in float64, and a closed form."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

AUTHORS = "Gray-OREO/MST-Distill@093b2fe KD_methods/MST.py, distillation_loss_detached"


def wave(phase: float, *shape: int) -> list:  # type: ignore[type-arg]
    """2 sin(1.7 i + phase), as nested lists: the tensors that the authors' code was run on."""
    flat = [2 * math.sin(1.7 * i + phase) for i in range(math.prod(shape))]
    for size in reversed(shape[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)]  # type: ignore[misc]
    return flat


ORACLES = [
    Oracle(
        "authors' detached distillation, T = 4",
        of="kd_plugin_mst_distill.loss:mst_loss",
        tensors={"student_logits": wave(0.0, 3, 4), "teacher_logits": wave(1.0, 3, 4)},
        value=0.9353599778439561,
        gradient={
            "student_logits": [
                [-0.15157239972656755, 0.14299374054388747, 0.08978207611389337, -0.08120341693121318],
                [-0.0936051373498487, 0.1803736348635875, 0.03754258189051769, -0.12431107940425658],
                [0.008951936703471003, 0.15191560956752082, -0.0135680545318897, -0.14729949173910212],
            ]
        },
        source=AUTHORS,
    ),
    Oracle(
        "two classes, T = 4",
        of="kd_plugin_mst_distill.loss:mst_loss",
        tensors={"student_logits": [[2.0, 0.0]], "teacher_logits": [[0.0, 0.0]]},
        # q = sigmoid(1/2): 16 (-ln(2q)/2 - ln(2(1-q))/2); gradient T (q - 1/2)
        value=16 * -0.5 * math.log(4 / (1 + math.exp(-0.5)) / (1 + math.exp(0.5))),
        gradient={
            "student_logits": [[4 * (1 / (1 + math.exp(-0.5)) - 0.5), -4 * (1 / (1 + math.exp(-0.5)) - 0.5)]]
        },
        source="closed form: KL(uniform || (q, 1 - q))",
    ),
]
