"""What ``mix_kd_loss`` must give: the authors' code run once in float64, and closed forms."""

from __future__ import annotations

import math

from kdcore.testing import Oracle, Seeded

AUTHORS = "hchoi71/MIX-KD@6e8c149b distiller_zoo/MIXSTD.py"
LOSS = "kd_plugin_mix_kd.loss:mix_kd_loss"
_SAMPLES = {
    "student_logits": Seeded(1, (3, 4), 2.0),
    "teacher_logits": Seeded(2, (3, 4), 3.0),
    "target": [[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.25, 0.0, 0.0, 0.75]],
}
_ONE = {"gamma": 1.0, "alpha": 1.0}


def certain(classes: int) -> float:
    """Cross-entropy of the surest standardised vector, one class above all others: its floor."""
    r = math.sqrt(classes)
    return -math.log(math.exp(r) / (math.exp(r) + classes - 1))


def apart(classes: int) -> float:
    """KL of two such vectors with other classes on top: r (m - m e^-r), m the largest probability."""
    r, m = math.sqrt(classes), math.exp(-certain(classes))
    return r * m * (1 - math.exp(-r))


ORACLES = [
    Oracle(
        "the authors' weights",
        LOSS,
        _SAMPLES,
        value={"cls": 0.140117032613, "kd": 0.780704693369},
        gradient={
            "student_logits": [
                [-0.006121740844, 0.00558281143, 0.02558273951, -0.02504381009],
                [0.02274471425, -0.006851855513, -0.01897472443, 0.003081865696],
                [0.003575596663, 0.01428894866, -0.009761091609, -0.008103453713],
            ]
        },
        source=AUTHORS,
    ),
    Oracle(
        "both weights 1",
        LOSS,
        _SAMPLES,
        params=_ONE,
        value={"cls": 1.40117032613, "kd": 0.867449659299},
        gradient={
            "student_logits": [
                [-0.005583713102, -0.01759325168, 0.04253924937, -0.01936228459],
                [0.05783314847, -0.01835309392, -0.04881930668, 0.009339252126],
                [-0.01172469048, 0.03676113488, -0.0109790164, -0.014057428],
            ]
        },
        source=AUTHORS,
    ),
    Oracle(
        "three classes",
        LOSS,
        {
            "student_logits": [[2.0, 0.0, 0.0]],
            "teacher_logits": [[3.0, 1.0, -1.0]],
            "target": [[0.7, 0.3, 0.0]],
        },
        params=_ONE,
        value={"cls": [0.822562023455], "kd": [0.0503708722358]},
        # every vector (a, b, b) has the same standardised form, so nothing pulls along the first class
        gradient={"student_logits": [[0.0, -0.1968899653, 0.1968899653]]},
        source=AUTHORS,
    ),
    *(
        Oracle(
            f"the floor of {classes} classes",
            LOSS,
            {
                "student_logits": [[5.0, *[0.0] * (classes - 1)]],
                "teacher_logits": [[0.0, 0.1, *[0.0] * (classes - 2)]],
                "target": [0],
            },
            params=_ONE,
            value={"cls": [certain(classes)], "kd": [apart(classes)]},
            source="closed form: max probability e^r / (e^r + C - 1), r = sqrt(C)",
        )
        for classes in (3, 10)
    ),
]
