"""What the losses must give: the authors' code run once on tensors of ours, and the definition worked out by hand."""

from __future__ import annotations

import math
from typing import Any

from kdcore.testing import Oracle
from kdcore.testing.oracle import Seeded

AUTHORS = (
    "megvii-research/CVPR2023-UniDistill@32f02b4304cdf435b83b2265f59fdfed2710c3a5 "
    "BEVFusion_nuscenes_centerhead_camera_exp_distill_lidar.py"
)
UNSWAPPED = f"{AUTHORS}, with the line that swaps x and y taken out"
AREA = (0.0, -4.0, 16.0, 4.0)  # 8 rows, 16 columns of 1 m
NONE = [0.0] * 7 + [-1.0]
BOXES = [
    [[4.3, -0.9, 0.2, 4.1, 1.9, 1.5, 0.4, 0.0], [11.2, 2.1, -0.3, 7.5, 3.2, 1.6, -1.1, 0.0], NONE],
    [[7.7, 0.6, 0.0, 3.0, 1.5, 1.4, 2.2, 0.0], NONE, NONE],
]
EMPTY = [BOXES[0], [NONE, NONE, NONE]]  # a sample without boxes


def maps(name: str, seeds: tuple[int, int], channels: tuple[int, int], scale: float = 1.0) -> dict[str, Any]:
    sizes = ((2, c, 8, 16) for c in channels)
    pairs = zip(("student", "teacher"), seeds, sizes, strict=True)
    return {f"{side}_{name}": Seeded(seed, size, scale) for side, seed, size in pairs}


LOW = maps("low", (1, 2), (3, 3))
HIGH = maps("high", (3, 4), (4, 5))


def oracle(
    title: str, of: str, tensors: dict[str, Any], value: float, variant: str, boxes: Any = BOXES
) -> Oracle:
    return Oracle(
        f"{title}, {variant}",
        of=f"kd_plugin_unidistill.loss:{of}",
        tensors={**tensors, "boxes": boxes},
        params={"area": AREA, "variant": variant},
        value=value,
        source=AUTHORS if variant == "released" else UNSWAPPED,
    )


def small(of: str, name: str, seeds: tuple[int, int], channels: int, value: float, gradient: Any) -> Oracle:
    """Value and gradient at 3 x 4 cells."""
    shape = (1, channels, 3, 4)
    return Oracle(
        f"{name} maps of 3 x 4 cells, with gradient",
        of=f"kd_plugin_unidistill.loss:{of}",
        tensors={
            f"student_{name}": Seeded(seeds[0], shape),
            f"teacher_{name}": Seeded(seeds[1], shape),
            "boxes": [[[1.7, 1.2, 0.0, 1.4, 0.8, 1.0, 0.6, 0.0]]],
        },
        params={"area": (0.0, 0.0, 4.0, 3.0)},
        value=value,
        gradient={f"student_{name}": gradient},
        source=UNSWAPPED,
    )


FEATURE_GRADIENT = [
    [
        [
            [0.07010671489501318, 0.1695102541580154, -0.0028545762030504213, -9.373355147118598e-05],
            [0.05257787201210527, -0.14550942507313636, -0.19616161727224932, -0.00030532873509913304],
            [-8.656699488620227e-05, -0.02679173116173002, -0.03431202120503643, 0.0],
        ]
    ]
]
RELATION_GRADIENT = [
    [
        [
            [0.14258189872786492, 0.47344904630214285, 0.01858760661031867, -1.1287273380347527e-05],
            [0.07318708435434632, 0.04886820896332536, 0.02264985853887278, -3.6767292499303616e-05],
            [-1.7366425618014824e-05, -0.006221785429173832, -0.004470907197196239, 0.0],
        ],
        [
            [-0.0942023967337686, -0.5161926078956633, -0.041053530893729664, 3.1774720377329403e-06],
            [-0.01945770713410301, -0.14585017251301197, -0.08857810033105745, 1.0350333502428936e-05],
            [-1.449066422923619e-05, -0.026778733100731724, -0.03339566374073215, 0.0],
        ],
    ]
]


def one_hot_halves() -> list[Any]:
    """[1, 2, 8, 8]: one channel for each half of the map."""
    left = [[1.0] * 4 + [0.0] * 4 for _ in range(8)]
    return [[left, [row[::-1] for row in left]]]


ORACLES = [
    oracle("feature", "feature_loss", LOW, 0.5016938714335668, "released"),
    oracle("feature", "feature_loss", LOW, 0.4883710165771406, "paper"),
    oracle("feature, a sample without boxes", "feature_loss", LOW, 0.46050098532640904, "released", EMPTY),
    oracle("relation", "relation_loss", HIGH, 0.3954462349771077, "released"),
    oracle("relation", "relation_loss", HIGH, 0.3805847161989014, "paper"),
    small("feature_loss", "low", (21, 22), 1, 0.6280007065563545, FEATURE_GRADIENT),
    small("relation_loss", "high", (23, 24), 2, 0.6347624059296452, RELATION_GRADIENT),
    Oracle(
        "relation of a constant map and one of two halves",
        of="kd_plugin_unidistill.loss:relation_loss",
        tensors={
            "student_high": [[[[1.0] * 8] * 8]],
            "teacher_high": one_hot_halves(),
            "boxes": [[[4.0, 4.0, 0.0, 6.0, 6.0, 1.0, 0.0, 0.0]]],
        },
        params={"area": (0.0, 0.0, 8.0, 8.0)},
        # 3 points left, 3 right, 3 between: 18 pairs with cosine 0, 36 with sqrt(1/2); eps in norm and count
        value=(18 + 36 * (1 - math.sqrt(0.5))) / 81,
        tolerance=(3e-4, 3e-4, 2e-2),
        source="closed form: cosines of one-hot vectors",
    ),
    Oracle(
        "response at one cell",
        of="kd_plugin_unidistill.loss:response_loss",
        tensors={
            "student_heatmap": [[[[0.0]]]],
            "teacher_heatmap": [[[[2.0]]]],
            "boxes": [[[0.5, 0.5, 0.0, 0.5, 0.5, 1.0, 0.0, 0.0]]],
            "student_regression": [[[[0.0]]] * 11],
            "teacher_regression": [[[[1.0]]] * 2 + [[[0.0]]] * 9],
        },
        params={"area": (0.0, 0.0, 1.0, 1.0)},
        value={"cls": (1 / (1 + math.exp(-1)) - 0.5) / (1 + 1e-4), "reg": 2 / 11 / (1 + 1e-4)},
        gradient={"student_heatmap": [[[[-0.25 / (1 + 1e-4)]]]]},
        source="closed form: sigmoid(2 / 2) - sigmoid(0), 2 of 11 channels off by 1",
    ),
    Oracle(
        "response of two tasks",
        of="kd_plugin_unidistill.loss:response_loss",
        tensors={
            **maps("heatmap", (5, 7), (3, 3), 2.0),
            "boxes": BOXES,
            **maps("regression", (9, 11), (20, 20)),
        },
        params={"area": AREA},
        value={"cls": 0.2586611638528323, "reg": 1.1196275268624871},
        source=AUTHORS,
    ),
]
