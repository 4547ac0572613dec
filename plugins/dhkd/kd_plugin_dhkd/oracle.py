"""What the losses must give: the authors' code run once in float64, and closed forms."""

from __future__ import annotations

from typing import Any

from kdcore.testing import Oracle, Seeded

AUTHORS = "penghui-yang/DHKD@7976c69d"
NORM, BINARY = "kd_plugin_dhkd.loss:binary_kl_norm", "kd_plugin_dhkd.loss:binary_kl"
_LOGITS = {"student_logits": Seeded(1, (3, 4), 2.0), "teacher_logits": Seeded(2, (3, 4), 3.0)}
_PAIR = {"student_logits": [[1.0, 0.0]], "teacher_logits": [[3.0, -1.0]]}
_NORM_2: dict[str, Any] = {
    "value": 8.72240506267,
    "gradient": {
        "student_logits": [
            [0.2697372372, -0.08591084696, 0.2904019276, -0.3144150746],
            [0.3148186483, -0.1590940744, 0.1527897495, 0.167678726],
            [0.2470436205, 0.1686002162, 0.1024038494, -0.3306157237],
        ]
    },
}
_BINARY_2: dict[str, Any] = {
    "value": 7.50619335357,
    "gradient": {
        "student_logits": [
            [0.3245196404, -0.08483587721, 0.2212926351, -0.4443201133],
            [0.4268215563, -0.08635161091, 0.1141183198, 0.1230687458],
            [0.2728490374, 0.1562055203, 0.07739754336, -0.5705659597],
        ]
    },
}

ORACLES = [
    *(
        Oracle(
            f"{name}, tau 2, {variant}",
            of,
            _LOGITS,
            params={"variant": variant},
            source=f"{AUTHORS} distiller_zoo/{file}",
            **expected,
        )
        for name, of, file, expected in (
            ("BinaryKL-Norm", NORM, "BinaryKLNorm.py", _NORM_2),
            ("BinaryKL", BINARY, "BinaryKL.py", _BINARY_2),
        )
        for variant in ("paper", "released")
    ),
    Oracle(
        "BinaryKL-Norm, tau 4",
        NORM,
        _LOGITS,
        params={"temperature": 4.0},
        value=11.0567163039,
        gradient={
            "student_logits": [
                [0.3398227686, -0.08738697465, 0.3895612333, -0.4720603136],
                [0.4738967822, -0.1693616168, 0.1617882628, 0.1798871878],
                [0.2956197741, 0.1810325938, 0.1049412637, -0.5864928572],
            ]
        },
        source=f"{AUTHORS} distiller_zoo/BinaryKLNorm.py",
    ),
    Oracle(
        "BinaryKL, tau 4",
        BINARY,
        _LOGITS,
        params={"temperature": 4.0},
        value=10.6564165881,
        gradient={
            "student_logits": [
                [0.3601124628, -0.0871071946, 0.3555704401, -0.5397977616],
                [0.5331235876, -0.1424864711, 0.1494104821, 0.1651474417],
                [0.3044936055, 0.1773326201, 0.09745067732, -0.7799328379],
            ]
        },
        source=f"{AUTHORS} distiller_zoo/BinaryKL.py",
    ),
    Oracle(
        "4 (log cosh 0.5 + log cosh 0.25)",
        NORM,
        _PAIR,
        value=[0.6041772423137554],
        gradient={"student_logits": [[-0.4621171573, 0.2449186624]]},
        source="closed form: gradient (tau / 2) tanh((z - t) / (2 tau))",
    ),
    Oracle(
        "BinaryKL of one pair",
        BINARY,
        _PAIR,
        value=[0.4821521774870553],
        source="closed form: the divergence of two Bernoulli distributions a class, in Python floats",
    ),
    Oracle(
        "the component, one head",
        "loss:dhkd",
        {"student_feature": [[1.0, 0.0]], "teacher_logits": [[3.0, -1.0]]},
        params={"head": "none"},
        value=[0.6041772423137554],
        gradient={"student_feature": [[-0.4621171573, 0.2449186624]]},
        source="closed form: gradient (tau / 2) tanh((z - t) / (2 tau))",
    ),
    Oracle(
        "both gaps beyond the released clamp",
        NORM,
        {"student_logits": [[200.0, -200.0]], "teacher_logits": [[0.0, 0.0]]},
        # log cosh x = |x| - log 2 + 2e-44 at x = 50
        value=[394.4548225556],
        gradient={"student_logits": [[1.0, -1.0]]},
        source="closed form: 4 * 2 (50 - log 2)",
    ),
]
