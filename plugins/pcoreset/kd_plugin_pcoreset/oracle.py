"""What the distance to the labelled set must be; the authors' picks themselves are in the plugin's tests."""

from __future__ import annotations

from kdcore.testing import Oracle

ORACLES = [
    Oracle(
        "corners and a centre, two labelled",
        "kd_plugin_pcoreset.selection:distance_to_set",
        {
            "points": [
                [1.0, 0.0, 0.0],
                [0.9, 0.1, 0.0],
                [0.0, 1.0, 0.0],
                [0.0, 0.0, 1.0],
                [0.34, 0.33, 0.33],
            ],
            "centres": [[1.0, 0.0, 0.0], [0.2, 0.5, 0.3]],
        },
        value=[0.0, 0.1414213562, 0.6164414003, 0.8831760866, 0.2222611077],
        gradient={
            "points": [
                [0.0, 0.0, 0.0],
                [-0.1414213562, 0.1414213562, 0.0],
                [-0.0648885685, 0.1622214211, -0.0973328527],
                [-0.0452910814, -0.1132277034, 0.1585187848],
                [0.1259779558, -0.152973232, 0.0269952762],
            ]
        },
        source="brute force: Python's math.dist to each labelled point, and the unit vectors to the nearest",
    )
]
