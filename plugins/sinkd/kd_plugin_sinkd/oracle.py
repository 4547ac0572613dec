"""What the losses must give: the authors' code run once in float64, and closed forms."""

from __future__ import annotations

import math

from kdcore.testing import Oracle, Seeded

AUTHORS = "2018cx/SinKD@1ffac901 loss.py"
LOSS = "kd_plugin_sinkd.loss:sinkd_loss"
_LOGITS = {"student_logits": Seeded(1, (5, 4), 3.0), "teacher_logits": Seeded(2, (5, 4), 4.0)}


def _logits(*rows: tuple[float, ...]) -> list[list[float]]:
    """Logits whose softmax at temperature 1 is each row."""
    return [[math.log(p) for p in row] for row in rows]


def _fifth(rows: list[list[float]]) -> list[list[float]]:
    """The authors' sum over five samples as a mean."""
    return [[value / 5 for value in row] for row in rows]


ORACLES = [
    Oracle(
        "the authors' module",
        LOSS,
        _LOGITS,
        params={"variant": "released"},
        value=0.0049127583406,
        gradient={
            "student_logits": [
                [2.089133089e-05, -8.471212808e-06, 3.436839972e-06, -1.585695806e-05],
                [-0.0001675457662, -1.359339439e-06, 0.0001829013162, -1.399621056e-05],
                [4.966365442e-05, -1.761086035e-05, -3.007618566e-05, -1.976608404e-06],
                [4.94986789e-05, 2.244992471e-06, -5.311208139e-05, 1.368410017e-06],
                [9.638100337e-05, 3.27631257e-05, 0.0001331456954, -0.0002622898244],
            ]
        },
        source=f"{AUTHORS} Sinkhorn.forward",
    ),
    Oracle(
        "epsilon 0.2",
        LOSS,
        _LOGITS,
        params={"epsilon": 0.2},
        value=5.00326776114 / 5,
        gradient={
            "student_logits": _fifth(
                [
                    [0.02738078806, -0.01385284686, 0.002011909809, -0.015539851],
                    [-0.09937065929, -0.001219158826, 0.114395061, -0.01380524292],
                    [0.0225390809, -0.01261239503, -0.00755062181, -0.002376064053],
                    [0.03461224339, 0.01140132293, -0.04439933537, -0.001614230943],
                    [0.09500244383, 0.03519288062, 0.1312168816, -0.2614122061],
                ]
            )
        },
        source=f"{AUTHORS} Sinkhorn.sinkhorn_loss",
    ),
    Oracle(
        "5 rounds, tokens as samples",
        LOSS,
        {
            "student_logits": Seeded(1, (1, 5, 4), 3.0),
            "teacher_logits": Seeded(2, (1, 5, 4), 4.0),
            "mask": [[True] * 5],
        },
        params={"rounds": 5},
        value=4.12615505448 / 5,
        gradient={
            "student_logits": [
                _fifth(
                    [
                        [0.08015698617, -0.03200229349, -0.03076959439, -0.01738509829],
                        [-0.1271823847, -0.0009916874479, 0.138167783, -0.009993710836],
                        [0.02636557554, -0.00180893097, -0.0235628447, -0.0009937998714],
                        [0.04847604559, 0.04280754313, -0.1063801403, 0.01509655159],
                        [0.2022671105, 0.06550043055, 0.2801799117, -0.5479474528],
                    ]
                )
            ]
        },
        source=f"{AUTHORS} Sinkhorn.sinkhorn_loss",
    ),
    Oracle(
        "two points, W = [[0.2, 1.0], [1.2, 0.0]]",
        LOSS,
        {
            "student_logits": _logits((0.8, 0.2), (0.3, 0.7)),
            "teacher_logits": _logits((0.9, 0.1), (0.3, 0.7)),
        },
        params={"temperature": 1.0},
        value=0.20033732318936473 / 2,
        source=f"{AUTHORS} Sinkhorn.sinkhorn_loss",
    ),
    Oracle(
        "one sample: the L1 distance",
        LOSS,
        {"student_logits": _logits((0.7, 0.2, 0.1)), "teacher_logits": _logits((0.5, 0.3, 0.2))},
        params={"temperature": 1.0},
        # d|p - q|_1 / ds_k = p_k (sign_k - sum_j p_j sign_j), signs (1, -1, -1)
        value=0.4,
        gradient={"student_logits": [[0.42, -0.28, -0.14]]},
        source="closed form: the plan is 1",
    ),
    Oracle(
        "the sample-wise term, T = 1",
        "kd_plugin_sinkd.kl:soft_cross_entropy",
        _LOGITS,
        value=4.8050197394,
        gradient={
            "student_logits": [
                [0.1993295053, 1.784630875e-05, 0.0003127033525, -0.199660055],
                [0.01331663124, -0.000916764029, -0.01231851756, -8.134965681e-05],
                [0.006242931711, 0.001134039448, 0.1924281478, -0.199805119],
                [-0.02132533042, 0.001825557927, 0.02111646735, -0.001616694855],
                [0.01413982955, -0.1945006654, 0.02998223128, 0.1503786045],
            ]
        },
        source=f"{AUTHORS} DistillKL(1)",
    ),
    Oracle(
        "the sample-wise term, T = 3",
        "loss:sinkd.kl",
        _LOGITS,
        params={"temperature": 3.0},
        value=2.12857000295,
        gradient={
            "student_logits": [
                [0.04800793418, -0.0003869967817, 0.005633589072, -0.05325452647],
                [0.01589285919, -0.007699459838, -0.006840812353, -0.001352587],
                [0.01322083421, 0.007043561353, 0.03777763311, -0.05804202867],
                [-0.008646999871, 0.005403735695, 0.006616595687, -0.00337333151],
                [0.004619719339, -0.03791702524, 0.01355502726, 0.01974227864],
            ]
        },
        source=f"{AUTHORS} DistillKL(3)",
    ),
]
