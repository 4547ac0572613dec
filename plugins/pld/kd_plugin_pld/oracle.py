"""What ``pld_loss`` must give: closed forms, and the definition worked out in Python floats.

There is no official code. The brute force chooses class after class among those that are left, and sums
alpha_k (sigma_k - e_k) for the gradient.
"""

from __future__ import annotations

from kdcore.testing import Oracle, Seeded

_FUNCTION = "kd_plugin_pld.loss:pld_loss"
_SAMPLES = {
    "student_logits": Seeded(1, (3, 5), 2.0),
    "teacher_logits": Seeded(2, (3, 5), 2.0),
    "target": [0, 4, 2],
}

ORACLES = [
    Oracle(
        "two classes: softmax(t)[y] CE(s, y)",
        _FUNCTION,
        {
            "student_logits": [[1.0, 0.0], [1.0, 0.0]],
            "teacher_logits": [[2.0, 0.0], [2.0, 0.0]],
            "target": [0, 1],
        },
        value=[0.2759199790, 0.1565446305],
        source="closed form: 0.880797 * 0.313262 and 0.119203 * 1.313262",
    ),
    Oracle(
        "three classes",
        _FUNCTION,
        {"student_logits": [[1.0, 0.0, -1.0]], "teacher_logits": [[0.0, 2.0, 1.0]], "target": [0]},
        value=[0.24509],
        gradient={"student_logits": [[-0.0301, -0.1569, 0.1870]]},
        source="closed form: steps 0.40761, 0.31326, 0 with weights 0.09003, 0.66524, 0.24473",
        tolerance=(3e-4, 3e-4, 3e-4),
    ),
    Oracle(
        "tau = 1",
        _FUNCTION,
        _SAMPLES,
        value=[3.90815374099, 0.559932229453, 7.02591235523],
        gradient={
            "student_logits": [
                [-0.001031540929, 0.004455514228, 0.01787668485, -0.311195494, 0.2898948359],
                [-0.01866972717, -0.001655023411, 0.005037768397, 0.03147660048, -0.0161896183],
                [0.1999904283, -0.3104913412, -0.003384836521, 0.005648008737, 0.1082377407],
            ]
        },
        source="brute force: the definition in Python floats",
    ),
    Oracle(
        "tau = 4",
        _FUNCTION,
        _SAMPLES,
        params={"temperature": 4.0},
        value=[2.55309158014, 1.68593225292, 3.83787979865],
        gradient={
            "student_logits": [
                [-0.01121200893, -0.05652167543, 0.01452998573, -0.154399785, 0.2076034837],
                [-0.0587677082, 0.0457144061, 0.01263603653, 0.05658171206, -0.05616444649],
                [0.1005759185, -0.1422647776, -0.04537750258, 0.006707569264, 0.08035879244],
            ]
        },
        source="brute force: the definition in Python floats",
    ),
]
