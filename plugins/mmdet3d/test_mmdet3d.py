"""What of the plugin needs no mmdet3d: being listed, refusing in words, the synthetic scenes, the metric."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore import InputError
from kdcore.testing.opening import opened

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin is not installed in the ordinary environment."""
    monkeypatch.syspath_prepend(str(HERE))
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "kd_plugin_mmdet3d"]:
        del sys.modules[name]


# ---- listed and refused -----------------------------------------------------------------------------------


def test_listing_the_plugin_imports_neither_torch_nor_mmdet3d() -> None:
    code = (
        "import sys, kd_plugin_mmdet3d as m;"
        "names = [c.name for c in [*m.kd_teachers(), *m.kd_students()]];"
        "print(names, sorted({'torch', 'mmdet3d', 'mmcv', 'mmengine', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['mmdet3d', 'mmdet3d'] []"


def test_without_mmdet3d_a_recipe_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcore.building import Builder

    find = importlib.util.find_spec
    absent = ("mmcv", "mmdet", "mmdet3d")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in absent else find(n, *a))
    with (
        opened(HERE),
        pytest.raises(InputError, match=r"mmcv and mmdet and mmdet3d cannot be imported[\s\S]*mmdet3d>=1\.4"),
    ):
        Builder(0).make("student", "mmdet3d", {"config": {"type": "VoxelNet"}}, "student")


# ---- synthetic scenes -------------------------------------------------------------------------------------


def batch(count: int = 6, **options: Any) -> dict[str, Any]:
    from kd_plugin_mmdet3d.synthetic import scenes

    found: dict[str, Any] = scenes(**options).train.batch(torch.arange(count))
    return found


def inside(points: Tensor, box: Tensor, margin: float) -> Tensor:
    """Bool [N]: which points lie in a box (x, y, z of the bottom, sizes, yaw)."""
    x, y = (points[:, :2] - box[:2]).unbind(1)
    cos, sin = box[6].cos(), box[6].sin()
    along, across, up = cos * x + sin * y, cos * y - sin * x, points[:, 2] - box[2]
    flat = (along.abs() < box[3] / 2 + margin) & (across.abs() < box[4] / 2 + margin)
    return flat & (up > -margin) & (up < box[5] + margin)


def test_returns_of_vehicles_lie_on_their_boxes() -> None:
    """Without noise, what reflects more than the ground is on the surface of a box: inside it, but not deep inside."""
    made = batch(noise=0.0)
    for points, rows in zip(made["points"], made["boxes"], strict=True):
        hits = points[points[:, 3] > 0.15]
        true = rows[rows[:, -1] >= 0]
        near = torch.stack([inside(hits, box, 1e-3) for box in true]).any(0)
        shrunk = torch.stack([inside(hits, box, -1e-2) for box in true]).any(0)
        assert len(hits) > 30
        assert near.all()
        assert not shrunk.any()
        ground = points[points[:, 3] <= 0.15]
        torch.testing.assert_close(ground[:, 2], torch.full_like(ground[:, 2], -1.6))


def test_the_camera_sees_each_unhidden_vehicle_where_its_centre_projects() -> None:
    """Red cars and blue trucks: the pixel of the nearest box's centre has its class's colour."""
    made = batch(12)
    for image, matrix, rows in zip(made["img"], made["lidar2img"], made["boxes"], strict=True):
        true = rows[rows[:, -1] >= 0]
        box = true[true[:, :2].norm(dim=1).argmin()]
        centre = torch.tensor([box[0], box[1], box[2] + box[5] / 2, 1.0])
        u, v, depth, _ = (matrix @ centre).tolist()
        red, _, blue = image[:, int(v / depth), int(u / depth)].tolist()
        assert (red > 1.5 * blue) if box[-1] == 0 else (blue > 1.5 * red)


def test_a_scene_is_a_function_of_seed_and_number() -> None:
    from kd_plugin_mmdet3d.synthetic import scene, scenes

    first = scene(0, 100, 0.03)
    scene.cache_clear()
    again, other = scene(0, 100, 0.03), scene(1, 100, 0.03)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["boxes"], other["boxes"])
    data = scenes(train=96, val=4, test=4)
    assert torch.equal(data.val.batch(torch.tensor([0]))["id"], torch.tensor([96]))
    assert torch.equal(data.val.batch(torch.tensor([0]))["boxes"][0], scene(0, 96, 0.03)["boxes"])


# ---- maps -------------------------------------------------------------------------------------------------


def test_a_volumes_impulse_at_x_y_is_at_row_y_column_x() -> None:
    from kd_plugin_mmdet3d.families import along_yx

    volume = torch.zeros(1, 1, 6, 4, 2)  # X, Y, Z
    volume[0, 0, 5, 1, 0] = 2.0
    found = along_yx(volume, volume=True)
    assert found.shape == (1, 1, 4, 6)
    assert found.nonzero().tolist() == [[0, 0, 1, 5]]
    assert float(found.max()) == 1.0  # the mean over Z
    assert along_yx(found, volume=False) is found


# ---- the metric -------------------------------------------------------------------------------------------


def detections(*rows: tuple[float, float, float, float]) -> Tensor:
    """[1, K, 9] of x, y, score, label."""
    out = torch.zeros(1, len(rows), 9)
    for place, (x, y, score, label) in enumerate(rows):
        out[0, place, [0, 1, 7, 8]] = torch.tensor([float(v) for v in (x, y, score, label)])
    return out


def truth(*rows: tuple[float, float, float]) -> Tensor:
    out = torch.zeros(1, len(rows), 8)
    for place, (x, y, label) in enumerate(rows):
        out[0, place, [0, 1, 7]] = torch.tensor([float(v) for v in (x, y, label)])
    return out


def judged(*pairs: tuple[Tensor, Tensor]) -> float:
    from kd_plugin_mmdet3d.metric import NuScenesMAP

    metric = NuScenesMAP()
    for predicted, true in pairs:
        metric.update(predicted, true)
    return float(metric.compute())


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(1, 1, 0.9, 0), (9, 9, 0.8, 1)], 1.0),  # both, exactly
        ([(1, 1.7, 0.9, 0), (9, 9, 0.8, 1)], 0.875),  # the first 0.7 m off: fails at 0.5 m alone
        ([(1, 1, 0.9, 1), (9, 9, 0.8, 0)], 0.0),  # classes exchanged
        ([(1, 1, 0.9, 0)], 0.5),  # one class is not found
        ([(1, 1, 0.9, -1), (9, 9, 0.8, -1)], 0.0),  # padding
    ],
)
def test_mean_average_precision_by_hand(found: list[Any], expected: float) -> None:
    assert judged((detections(*found), truth((1, 1, 0), (9, 9, 1)))) == pytest.approx(expected)


def test_a_false_alarm_ranked_first() -> None:
    """Precision r / 2 at recall r: the sum over k = 20 to 100 of 0.005 k - 0.1 is 16.2; over 90 points and 0.9, 0.2."""
    found = detections((5, 5, 0.9, 0), (1, 1, 0.5, 0))
    assert judged((found, truth((1, 1, 0)))) == pytest.approx(0.2)


def test_a_truth_is_taken_once_and_scenes_are_apart() -> None:
    """Twice the same box: the second is a false alarm. The other scene's truth is no match."""
    twice = detections((1, 1, 0.9, 0), (1, 1, 0.8, 0), (2, 2, 0.7, 0))
    there, elsewhere = truth((1, 1, 0)), truth((2, 2, 0))
    precision, recall = np.array([1.0, 0.5, 1 / 3]), np.array([0.5, 0.5, 0.5])
    at = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)
    expected = np.clip(at[11:] - 0.1, 0, None).mean() / 0.9
    assert judged((twice, there), (detections((9, 9, 0.1, -1)), elsewhere)) == pytest.approx(expected)


def test_without_truth_there_is_no_number() -> None:
    assert np.isnan(judged((detections((1, 1, 0.9, 0)), truth((1, 1, -1)))))
