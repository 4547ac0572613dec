"""What losses and measures must give: the authors' code run once, and two classes worked out by hand."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

_SOURCE = "LCS2-IIITD/KD_generalization@a5fed92: generative/kd_trainer.py"
_TENSORS = {
    "student_logits": [
        [[0.5, -1.0, 2.0, 0.1], [1.5, 0.2, -0.3, 0.0], [0.0, 0.0, 1.0, -2.0]],
        [[-0.7, 0.9, 0.4, 1.1], [2.0, -1.0, 0.5, 0.3], [0.6, 0.6, -0.6, 0.2]],
    ],
    "teacher_logits": [
        [[1.0, 0.0, -1.0, 2.0], [0.3, 1.7, 0.5, -0.9], [2.0, -1.0, 0.0, 0.4]],
        [[0.1, 0.8, -1.2, 0.5], [-0.4, 1.3, 0.9, 0.0], [1.1, -0.2, 0.7, 0.3]],
    ],
    "mask": [[True, True, True], [True, False, False]],
}
_NONE = [0.0, 0.0, 0.0, 0.0]
_JS = 0.5 * (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)) + 0.25 * math.log(0.25 / 0.21)

ORACLES = [
    Oracle(
        "forward KL, T = 2",
        "loss:kd-fidelity",
        _TENSORS,
        value=[1.1169345807, 0.2741272147],
        gradient={
            "student_logits": [
                [
                    [-0.016383033, -0.020082089, 0.126238745, -0.089773623],
                    [0.067419866, -0.071329848, -0.022477794, 0.026387776],
                    [-0.080382664, 0.046535788, 0.076724544, -0.042877667],
                ],
                [[-0.105439302, -0.040912878, 0.10822661, 0.03812556], _NONE, _NONE],
            ]
        },
        params={"temperature": 2.0},
        source=f"{_SOURCE}, sequence_kl_divergence",
        tolerance=(1e-6, 1e-5, 5e-2),
    ),
    Oracle(
        "reverse KL, T = 2",
        "kd_plugin_kd_fidelity.loss:sequence_divergence",
        _TENSORS,
        value=[1.2713086959, 0.2784689566],
        gradient={
            "student_logits": [
                [
                    [-0.051695691, -0.033349218, 0.170707546, -0.085662637],
                    [0.068357618, -0.062157745, -0.02865278, 0.022452907],
                    [-0.080569566, 0.043913807, 0.072401627, -0.035745869],
                ],
                [[-0.087277685, -0.059238743, 0.129096724, 0.017419704], _NONE, _NONE],
            ]
        },
        params={"kind": "reverse", "temperature": 2.0},
        source=f"{_SOURCE}, sequence_reverse_kl_divergence",
        tolerance=(1e-6, 1e-5, 5e-2),
    ),
    Oracle(
        "Jensen-Shannon, mean of each sequence",
        "kd_plugin_kd_fidelity.loss:sequence_divergence",
        _TENSORS,
        value=[0.2288531068, 0.0461416001],
        gradient={
            "student_logits": [
                [
                    [-0.006463086, -0.002403174, 0.022338611, -0.01347235],
                    [0.015578294, -0.014001945, -0.004289337, 0.002712988],
                    [-0.017513844, 0.005550067, 0.015086645, -0.003122868],
                ],
                [[-0.012881327, -0.014455027, 0.019865806, 0.007470548], _NONE, _NONE],
            ]
        },
        params={"kind": "js"},
        source=f"{_SOURCE}, generalized_jsd_loss with beta 0.5 and no reduction",
        tolerance=(1e-6, 1e-5, 5e-2),
    ),
    Oracle(
        "fidelity of two classes",
        "kd_plugin_kd_fidelity.measures:fidelity",
        {
            "student_logits": [[0.0, 0.0], [math.log(9), 0.0], [60.0, 0.0]],
            "teacher_logits": [[math.log(9), 0.0], [math.log(9), 0.0], [0.0, 60.0]],
        },
        value=[1 - _JS / math.log(2), 1.0, 0.0],
        source="closed form: JS of (0.9, 0.1) and (0.5, 0.5) about the mixture (0.7, 0.3)",
    ),
]
