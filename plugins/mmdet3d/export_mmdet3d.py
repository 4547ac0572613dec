"""With mmdet3d installed (`make test-mmdet3d`): what leaves as ONNX, and the numpy code around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kd_plugin_mmdet3d import around, export
from kd_plugin_mmdet3d.models import MMDet3DStudent
from kd_plugin_mmdet3d.synthetic import scenes

import kdcore
from kdcore import Batch, InputError
from kdcore.shipping import load_student, request_of

SMALL = "kd_plugin_mmdet3d.small"
EXPORTABLE = ("pointpillars", "centerpoint", "imvoxelnet")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(scenes(train=3, val=1, test=1).train.batch(torch.arange(3)))


def student(name: str) -> MMDet3DStudent:
    """Untrained, with every threshold at 0: what it says of a scene is boxes enough."""
    torch.manual_seed(0)
    made = MMDet3DStudent(config=f"{SMALL}:{name}", args={"width": 8}).eval()
    head: Any = made.head
    head.test_cfg["score_thr"] = head.test_cfg["score_threshold"] = 0.0
    if hasattr(head.bbox_coder, "score_threshold"):
        head.bbox_coder.score_threshold = 0.0
    return made


def host_of(made: MMDet3DStudent, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The functions of the file that ships, and a receiver's inputs."""
    text, raw = made.host(batch)
    names: dict[str, Any] = {}
    exec(compile(text, "host.py", "exec"), names)
    return names, raw


@pytest.mark.parametrize("name", EXPORTABLE)
@torch.no_grad()
def test_host_graph_host_gives_the_librarys_boxes(name: str, batch: Batch) -> None:
    """From raw clouds or images, through the shipped file and the graph's module, to mmdet3d's own boxes."""
    made = student(name)
    host, raw = host_of(made, batch)
    feeds = host["preprocess"](raw)
    said = made.deploy()(**{n: torch.from_numpy(v) for n, v in feeds.items()})
    outputs = made(batch)
    for key, value in made.graph(outputs).items():
        torch.testing.assert_close(said[key], value, rtol=1e-4, atol=1e-5)
    found = host["postprocess"]({n: v.numpy() for n, v in said.items()})["boxes"]
    expected = made.infer(outputs)["boxes"].numpy()
    assert (expected[..., -1] >= 0).sum() > 20
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXPORTABLE)
def test_the_graphs_inputs_are_what_the_host_makes(name: str, batch: Batch) -> None:
    made = student(name)
    host, raw = host_of(made, batch)
    ours, theirs = made.inputs(batch), host["preprocess"](raw)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[n].numpy(), theirs[n]) for n in ours)


@pytest.mark.parametrize("crowded", [False, True])
def test_voxels_are_mmcvs_own(crowded: bool) -> None:
    """Points of each voxel, their number and order of voxels, also beyond both limits and outside the range."""
    made = student("pointpillars")
    layer = made.detector.data_preprocessor.voxel_layer
    spread = 0.6 if crowded else 14.0
    cloud = np.random.RandomState(0).uniform(-spread, spread, (6000, 4)).astype(np.float32) + np.float32(
        [9, 0, 0, 0]
    )
    voxels, coords, numbers = layer.eval()(torch.from_numpy(cloud))
    found = around.voxels(cloud, **export.settings(made.detector, made.family, 32)["points"])
    count = len(voxels)
    assert int((found["num_points"] > 0).sum()) == count
    np.testing.assert_array_equal(found["voxels"][:count], voxels.numpy())
    np.testing.assert_array_equal(found["num_points"][:count], numbers.numpy())
    np.testing.assert_array_equal(found["coords"][:count], coords[:, 1:].numpy())


def test_suppression_is_mmcvs_own() -> None:
    from mmcv.ops import nms_rotated

    rng = np.random.RandomState(1)
    boxes = np.zeros((60, 9), np.float32)
    boxes[:, :2], boxes[:, 3:6] = rng.uniform(0, 20, (60, 2)), rng.uniform(1, 5, (60, 3))
    boxes[:, 6], boxes[:, 7] = rng.uniform(-3, 3, 60), rng.permutation(60) / 60
    flat = torch.from_numpy(boxes[:, [0, 1, 3, 4, 6]])
    kept = nms_rotated(flat, torch.from_numpy(boxes[:, 7]), 0.1)[1].tolist()
    assert around.suppressed(boxes, overlap=0.1, before=60, after=60).tolist() == kept
    assert len(kept) < 55


def test_overlap_of_turned_squares_in_closed_form() -> None:
    """A unit square and the same turned by 45 degrees share a regular octagon of area 2 (sqrt 2 - 1)."""
    square, turned = np.zeros(9), np.zeros(9)
    square[3:5] = turned[3:5] = 1.0
    turned[6] = np.pi / 4
    shared = 2 * (np.sqrt(2) - 1)
    assert around.iou(around.polygon(square), around.polygon(turned)) == pytest.approx(shared / (2 - shared))


def test_scenes_without_points_or_boxes_go_through(batch: Batch) -> None:
    made = student("centerpoint")
    host, _ = host_of(made, batch)
    feeds = host["preprocess"]({"points": [np.zeros((0, 4), np.float32), batch["points"][0].numpy()]})
    assert feeds["num_points"][0].sum() == 0
    with torch.no_grad():
        said = made.deploy()(**{n: torch.from_numpy(v) for n, v in feeds.items()})
    assert all(v.isfinite().all() for v in said.values())
    silent = {n: np.full_like(v.numpy(), -20.0) for n, v in said.items()}
    quiet = MMDet3DStudent(config=f"{SMALL}:centerpoint", args={"width": 8}).eval()
    text, _ = quiet.host(batch)
    names: dict[str, Any] = {}
    exec(compile(text, "host.py", "exec"), names)
    assert (names["postprocess"](silent)["boxes"][..., -1] == -1).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (f"{SMALL}:mvxnet", "point fusion have none"),
        ("second/second_hv_secfpn_8xb6-80e_kitti-3d-car", "sparse convolution"),
    ],
)
def test_what_has_no_onnx_form_is_refused_in_words(config: str, words: str, batch: Batch) -> None:
    made = MMDet3DStudent(config=config)
    with pytest.raises(InputError, match=words):
        made.deploy()


def test_a_run_is_exported_and_its_artefact_finds_the_same_boxes(tmp_path: Path) -> None:
    """The whole way of `kd export`, its gates included, and the artefact alone on raw clouds."""
    from kd_exporter_onnx import load

    short = [
        "data.args.train=8",
        "data.args.val=4",
        "data.args.test=2",
        "train.epochs=1",
        "teacher.main.train.epochs=1",
    ]
    kdcore.run("mmdet3d:pillars", out=tmp_path / "run", overrides=short)
    rows = kdcore.export(tmp_path / "run", params={"benchmark": "none"})
    session = load(rows["artefact"], host_code=True)
    request = request_of(tmp_path / "run")
    assert request.raw_samples is not None
    served = session(request.raw_samples)["boxes"]
    made, run = load_student(tmp_path / "run")
    with torch.no_grad():
        expected = made.infer(made(next(iter(run.source.loader("val")))))["boxes"].numpy()
    np.testing.assert_allclose(served, expected, rtol=1e-3, atol=1e-3)
