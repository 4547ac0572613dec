"""Values and gradients of the authors' code, run once in float64. CRD has state: see test_crd.py."""

from __future__ import annotations

from kdcore.testing import Oracle, Seeded

_MAPS = (2, 2, 2, 2)
_EMBEDDINGS = {"student_embedding": Seeded(1, (4, 3)), "teacher_embedding": Seeded(2, (4, 2))}
_DKD = {
    "student_logits": Seeded(1, (3, 4), 2.0),
    "teacher_logits": Seeded(2, (3, 4), 3.0),
    "target": [2, 0, 3],
}
_DIST = {"student_logits": Seeded(1, (4, 3), 2.0), "teacher_logits": Seeded(2, (4, 3), 3.0)}
_REPDISTILLER = "HobbitLong/RepDistiller@b84f547c"
_MDISTILLER = "megvii-research/mdistiller@a08d46f1, mdistiller/distillers/DKD.py"
_HUNTO = "hunto/image_classification_sota@6f7a70a1, lib/models/losses/dist_kd.py"

ORACLES = [
    Oracle(
        "fitnet, repdistiller",
        "kd_plugin_classics.fitnet:hint_loss",
        {"guided": Seeded(1, _MAPS), "hint": Seeded(2, _MAPS)},
        params={"variant": "repdistiller"},
        value=3.04882245755,
        gradient={
            "guided": [
                [
                    [[0.2551379014, -0.0694361983], [0.2010030429, -0.3391549288]],
                    [[0.3323554018, -0.1824739164], [0.1552412934, 0.06051014821]],
                ],
                [
                    [[0.1721239144, 0.08245465493], [0.1138317366, -0.5440435903]],
                    [[-0.04549457463, 0.09173388631], [0.07433889022, -0.06296644594]],
                ],
            ]
        },
        source=f"{_REPDISTILLER}, distiller_zoo/FitNet.py",
    ),
    Oracle(
        "at, released",
        "loss:classics.at",
        {"student_feature": Seeded(1, _MAPS), "teacher_feature": Seeded(2, (2, 3, 2, 2))},
        params={"variant": "released"},
        value=0.204999523788,
        gradient={
            "student_feature": [
                [
                    [[-0.01029637004, -0.01403844807], [0.005337634714, 0.04655115198]],
                    [[-0.005485629709, -0.05281519042], [-0.0176328397, 0.03302525107]],
                ],
                [
                    [[-0.005547482358, 0.01569191428], [1.93258788e-05, -0.00631825705]],
                    [[0.005606221223, 0.02416705673], [1.498595984e-05, -0.003373262672]],
                ],
            ]
        },
        source=f"{_REPDISTILLER}, distiller_zoo/AT.py",
    ),
    Oracle(
        "at, released, a larger student",
        "loss:classics.at",
        {"student_feature": Seeded(1, (2, 2, 4, 4)), "teacher_feature": Seeded(2, (2, 3, 2, 2))},
        params={"variant": "released"},
        value=0.129811568700,
        source=f"{_REPDISTILLER}, distiller_zoo/AT.py",
    ),
    Oracle(
        "rkd, released",
        "loss:classics.rkd",
        _EMBEDDINGS,
        params={"variant": "released"},
        value=10.4767440528,
        gradient={
            "student_embedding": [
                [-1.723925774, 1.191145738, 1.862116458],
                [0.8134339672, 2.607494257, -1.049216097],
                [2.290904412, -1.047011022, -0.8725873122],
                [-1.380412605, -2.751628973, 0.05968695096],
            ]
        },
        source=f"{_REPDISTILLER}, distiller_zoo/RKD.py",
    ),
    Oracle(
        "rkd, released, distances",
        "loss:classics.rkd",
        _EMBEDDINGS,
        params={"distance_weight": 1.0, "angle_weight": 0.0, "variant": "released"},
        value=0.147418774440,
        source="lenscloth/RKD@0a6c3c0c, metric/loss.py",
    ),
    Oracle(
        "rkd, released, angles",
        "loss:classics.rkd",
        _EMBEDDINGS,
        params={"distance_weight": 0.0, "angle_weight": 1.0, "variant": "released"},
        value=0.135825493836,
        source="lenscloth/RKD@0a6c3c0c, metric/loss.py",
    ),
    Oracle(
        "dkd, defaults",
        "loss:classics.dkd",
        _DKD,
        value=42.3698444982,
        gradient={
            "student_logits": [
                [5.080174165, 0.1595015491, 0.1852560113, -5.424931726],
                [0.2851510092, -1.412607398, 0.7950831335, 0.3323732552],
                [1.306456236, 0.2693052874, -0.7575835463, -0.8181779766],
            ]
        },
        source=_MDISTILLER,
    ),
    Oracle(
        "dkd, target class alone",
        "loss:classics.dkd",
        _DKD,
        params={"alpha": 1.0, "beta": 0.0, "temperature": 1.0},
        value=2.42097295987,
        gradient={
            "student_logits": [
                [-0.004298753065, -4.910086835e-05, 0.004367374181, -1.952024834e-05],
                [0.04835896706, -1.468412626e-05, -0.04802456772, -0.0003197152181],
                [0.02968817418, 0.009525094553, 0.2920387424, -0.3312520111],
            ]
        },
        source=_MDISTILLER,
    ),
    Oracle(
        "dkd, other classes alone",
        "loss:classics.dkd",
        _DKD,
        params={"alpha": 0.0, "beta": 1.0, "temperature": 1.0},
        value=1.82294482979,
        gradient={
            "student_logits": [
                [0.3274053039, 0.001710883881, 0.0, -0.3291161878],
                [0.0, -0.005667992625, 0.005183521209, 0.0004844714157],
                [0.0272613871, 0.00549939121, -0.03276077831, 0.0],
            ]
        },
        source=_MDISTILLER,
    ),
    Oracle(
        "dist, inter-class",
        "loss:classics.dist",
        _DIST,
        params={"beta": 1.0, "gamma": 0.0},
        value=1.04820312807,
        gradient={
            "student_logits": [
                [-0.0004533512515, -0.002457928525, 0.002911279776],
                [-0.004001727173, 0.003665367103, 0.0003363600699],
                [-0.0004975086782, -6.107487333e-05, 0.0005585835516],
                [0.006228321952, -0.006067059277, -0.0001612626744],
            ]
        },
        source=_HUNTO,
    ),
    Oracle(
        "dist, intra-class",
        "loss:classics.dist",
        _DIST,
        params={"beta": 0.0, "gamma": 1.0},
        value=1.29990760995,
        gradient={
            "student_logits": [
                [-0.027303195, -0.004156637133, 0.03145983213],
                [-0.004072396476, -0.001900498242, 0.005972894718],
                [0.02319148593, 0.002357392121, -0.02554887805],
                [0.006446964717, -0.001925179213, -0.004521785504],
            ]
        },
        source=_HUNTO,
    ),
    Oracle(
        "dist, tau = 4",
        "loss:classics.dist",
        _DIST,
        params={"beta": 2.0, "gamma": 2.0, "temperature": 4.0},
        value=73.991460877,
        gradient={
            "student_logits": [
                [0.05879262653, -1.71493513, 1.656142504],
                [-2.373138244, 0.7475929517, 1.625545292],
                [-0.3269048207, 0.6486008643, -0.3216960436],
                [2.529050209, -1.096277006, -1.432773203],
            ]
        },
        source=_HUNTO,
    ),
]
