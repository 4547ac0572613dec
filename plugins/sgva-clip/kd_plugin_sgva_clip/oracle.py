"""What the guidance must give: the authors' code run once, and closed forms."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

_LOSS = "kd_plugin_sgva_clip.loss:guidance_loss"

ORACLES = [
    Oracle(
        "authors' logits, T = 5",
        _LOSS,
        {
            "student_adapted_text": [
                [8.355618009203, 4.073600397657, 7.739081719602],
                [-4.496633873786, 0.126191776169, -2.199316069584],
                [6.618893682036, 4.885058254487, 9.29418559748],
                [12.51369496106, -3.780177971696, -3.144301346855],
                [1.505172892392, 3.181728017593, 2.961100786445],
                [0.904764727616, 2.049332111576, 1.255144315144],
            ],
            "student_image_text": [
                [9.84468225064, 0.269073534816, 3.077984297604],
                [-9.865418216549, 1.970314530111, -1.067699310585],
                [5.863917719163, 7.457612089984, 8.91414976851],
                [7.151788332209, -1.446718954159, -4.111246745201],
                [0.686320734657, -3.140167885425, -0.871253830542],
                [-4.161863310654, 0.636587223821, 0.996673016584],
            ],
        },
        value=[0.949095063845, 0.912975340579, 1.107577536757, 0.789749213598, 1.15009863145, 1.079135064702],
        gradient={
            "student_adapted_text": [
                [-0.009274707886, 0.00263825397, 0.006636453916],
                [0.004623528667, -0.003882284201, -0.000741244466],
                [0.001855677964, -0.003973010691, 0.002117332727],
                [0.004849173566, -0.003465161045, -0.001384012521],
                [-0.006247259157, 0.005418954527, 0.00082830463],
                [0.004815796155, -0.000977310112, -0.003838486043],
            ]
        },
        source="FannierPeng/SgVA-CLIP@caa63d5 main.py, meta_train, newi2i+kd+i2t: its second term",
    ),
    Oracle(
        "two classes, T = 5",
        _LOSS,
        {"student_adapted_text": [[0.0, 0.0]], "student_image_text": [[5.0, 0.0]]},
        value=[math.log(2)],
        gradient={"student_adapted_text": [[-0.0462117157, 0.0462117157]]},
        source="closed form: against the uniform distribution; gradient (1/2 - sigmoid(1)) / 5",
    ),
    Oracle(
        "three classes, T = 5",
        _LOSS,
        {"student_adapted_text": [[0.0, 1.0, 0.0]], "student_image_text": [[2.0, 0.0, 0.0]]},
        value=[1.1125403],  # the guide's entropy 1.0795310 and a divergence of 0.0330092
        source="closed form: -sum softmax(0.4, 0, 0) log softmax(0, 0.2, 0)",
    ),
]
