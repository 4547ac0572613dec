"""What the distances must give: the authors' code run once in float64, brute force, closed forms."""

from __future__ import annotations

import math

from kdcore.testing import Oracle

AUTHORS = "lilujunai/DisWOT-CVPR2023@dffe4e6118a2ab6a5ed89c9495e1ee2b6c808afa distiller_zoo"
BRUTE = "brute force: Gram matrices by loops, gradient by central differences of fourth order, float64"


def wave(phase: float, *shape: int) -> list:  # type: ignore[type-arg]
    """2 sin(1.7 i + phase), as nested lists: the tensors that the authors' code was run on."""
    flat = [2 * math.sin(1.7 * i + phase) for i in range(math.prod(shape))]
    for size in reversed(shape[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)]  # type: ignore[misc]
    return flat


def column(*rows: tuple[float, float]) -> list:  # type: ignore[type-arg]
    """[len(rows), 1, 2, 1] of pairs."""
    return [[[[a], [b]]] for a, b in rows]


RELATION, GRADIENT = (
    "kd_plugin_diswot.metrics:relation_distance",
    "kd_plugin_diswot.metrics:gradient_distance",
)
EYE = [[1.0, 0.0], [0.0, 1.0]]
FEATURES = {"student_feature": wave(0.3, 4, 1, 2, 1), "teacher_feature": wave(1.0, 4, 3, 2, 2)}

ORACLES = [
    Oracle(
        "released relation",
        RELATION,
        FEATURES,
        value=0.4719251570318429,
        gradient={
            "student_feature": column(
                (0.02475384076056299, -0.010614310404284868),
                (-0.0236868835844457, 0.013177649731914659),
                (-0.01487361885757977, 0.022653731488948933),
                (0.012589705804111874, -0.02410835637632913),
            )
        },
        source=f"{AUTHORS}/SP.py, Similarity.similarity_loss",
    ),
    Oracle(
        "paper's relation",
        RELATION,
        FEATURES,
        value=1.3742697119131724,
        gradient={
            "student_feature": column(
                (0.0361046973762491, -0.01597142527491139),
                (-0.03384478948024553, 0.019010463068550955),
                (-0.022251048957070786, 0.03376154172525976),
                (0.01719709852114152, -0.03409090553925982),
            )
        },
        params={"variant": "paper"},
        source=BRUTE,
    ),
    Oracle(
        "released relation, orthogonal against equal samples",
        RELATION,
        {"student_feature": EYE, "teacher_feature": [[1.0, 0.0], [1.0, 0.0]]},
        value=1 - 1 / math.sqrt(2),
        source="closed form: rows (1,0), (0,1) against (1,1)/sqrt 2 twice",
    ),
    Oracle(
        "paper's relation, orthogonal against equal samples",
        RELATION,
        {"student_feature": EYE, "teacher_feature": [[1.0, 0.0], [1.0, 0.0]]},
        value=math.sqrt(2 - math.sqrt(2)),
        params={"variant": "paper"},
        source="closed form: I / sqrt 2 against a matrix of 1/2",
    ),
    Oracle(
        "released semantic",
        GRADIENT,
        {"student_gradient": wave(0.3, 3, 5), "teacher_gradient": wave(1.0, 3, 5)},
        value=1.0434531289735438,
        gradient={
            "student_gradient": [
                [
                    -0.07619607496762695,
                    0.04673641143684676,
                    0.06415261637409081,
                    -0.06326783426575577,
                    -0.04784919215180204,
                ],
                [
                    -0.014487872863552874,
                    -0.011425175142058546,
                    0.017432014690385536,
                    0.006933136907388777,
                    -0.019218607727813485,
                ],
                [
                    0.004483985653959998,
                    -0.08314614785533903,
                    0.01694186109212405,
                    0.07878041680565956,
                    -0.03724270701955592,
                ],
            ]
        },
        source=f"{AUTHORS}/ICKD.py, ICKDLoss.batch_loss",
    ),
    Oracle(
        "paper's semantic",
        "kd_plugin_diswot.metrics:activation_distance",
        {"student_maps": wave(0.3, 2, 3, 2, 1), "teacher_maps": wave(1.0, 2, 3, 2, 2)},
        value=1.361409554379635,
        gradient={
            "student_maps": [
                [
                    [[-0.006291350584941568], [-0.021623436630147094]],
                    [[-0.025066508433739067], [-0.03653817886029031]],
                    [[-0.017392460810450313], [-0.013021727131764155]],
                ],
                [
                    [[0.02032668510546879], [0.009038428672170083]],
                    [[0.04597060416962802], [0.005084570433207721]],
                    [[0.02319456409161091], [-0.004157987876229895]],
                ],
            ]
        },
        source=BRUTE,
    ),
]
