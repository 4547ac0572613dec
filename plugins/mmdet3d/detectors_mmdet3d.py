"""With mmdet3d installed (`make test-mmdet3d`): wrapped detectors against the library's own, and their maps' axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kd_plugin_mmdet3d import families, scene
from kd_plugin_mmdet3d.load import load_detector, quiet
from kd_plugin_mmdet3d.metric import DISTANCES, average_precision
from kd_plugin_mmdet3d.models import MMDet3DStudent, MMDet3DTeacher
from kd_plugin_mmdet3d.synthetic import scenes
from torch import Tensor, nn

import kdcore
from kdcore import Batch, InputError
from kdcore.testing import Finding, parametrize

SMALL = "kd_plugin_mmdet3d.small"
DETECTORS = ("pointpillars", "centerpoint", "imvoxelnet", "mvxnet")
SENSORS = {"pointpillars": "points", "centerpoint": "points", "imvoxelnet": "img", "mvxnet": "both"}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(scenes(train=3, val=1, test=1).train.batch(torch.arange(3)))


def student(name: str, **args: Any) -> MMDet3DStudent:
    torch.manual_seed(0)
    return MMDet3DStudent(config=f"{SMALL}:{name}", args={"width": 8, **args})


# ---- the library's own answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_are_the_librarys_own(name: str, batch: Batch) -> None:
    """``detector(**inputs, mode="loss")`` on the same batch: the same terms, the same gradient."""
    wrapped = student(name).train()
    wrapped.eval()  # running statistics stay, so both forwards see the same
    ours = wrapped.task_loss(wrapped(batch), batch)
    sum(ours.values()).backward()  # type: ignore[union-attr]
    mine = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    with quiet():
        inputs, samples = wrapped.prepared(batch)
        theirs = wrapped.detector(inputs, samples, mode="loss")
    total, _ = wrapped.detector.parse_losses(theirs)
    total.backward()
    torch.testing.assert_close(sum(ours.values()), total)
    for key, parameter in wrapped.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[key], parameter.grad)


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_boxes_are_the_librarys_own(name: str, batch: Batch) -> None:
    """``detector(**inputs, mode="predict")``, sorted by score; with a low threshold, so that there are boxes."""
    wrapped = student(name).eval()
    head = wrapped.head
    head.test_cfg["score_thr"] = head.test_cfg["score_threshold"] = 0.0
    if hasattr(head.bbox_coder, "score_threshold"):
        head.bbox_coder.score_threshold = 0.0
    found = wrapped.infer(wrapped(batch))["boxes"]
    with quiet():
        inputs, samples = wrapped.prepared(batch)
        theirs = wrapped.detector(inputs, samples, mode="predict")
    for rows, sample in zip(found, theirs, strict=True):
        own = sample.pred_instances_3d
        count = min(len(own.scores_3d), wrapped.most)
        assert count > 0
        assert int((rows[:, -1] >= 0).sum()) == count
        order = own.scores_3d.argsort(descending=True, stable=True)[:count]
        torch.testing.assert_close(rows[:count, :7], own.bboxes_3d.tensor[order, :7])
        torch.testing.assert_close(rows[:count, 7], own.scores_3d[order])


@pytest.mark.parametrize("name", DETECTORS)
def test_the_outputs_stay_raw_logits_through_loss_and_decoding(name: str, batch: Batch) -> None:
    """Heads take sigmoids in place; what losses of distillation read must not change under them."""
    wrapped = student(name).train()
    said = wrapped(batch)
    before = {n: v.detach().clone() for n, v in said.tensors.items()}
    assert said["heatmap"].min() < 0  # logits, not probabilities
    wrapped.task_loss(said, batch)
    wrapped.eval()
    wrapped.infer(said.detach())
    assert all(torch.equal(before[n], v) for n, v in said.tensors.items())


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_given_the_sensors_that_it_has_and_no_other(name: str, batch: Batch) -> None:
    wrapped, absent = student(name).eval(), {"points": ("img", "lidar2img"), "img": ("points",), "both": ()}
    kept = Batch({k: v for k, v in batch.items() if k not in absent[SENSORS[name]]})
    torch.testing.assert_close(wrapped(kept)["heatmap"], wrapped(batch)["heatmap"])
    needed = "img" if SENSORS[name] == "img" else "points"
    with pytest.raises(InputError, match=f"needs '{needed}'"):
        wrapped(Batch({k: v for k, v in batch.items() if k != needed}))


def test_a_last_cloud_without_points_is_refused_and_a_first_one_is_not(batch: Batch) -> None:
    """mmdet3d takes the number of samples from the last voxel: it would answer for fewer, without a word."""
    wrapped, far = student("pointpillars").eval(), torch.full((3, 4), 99.0)
    points = list(batch["points"])
    assert len(wrapped(Batch({"id": batch["id"], "points": [far, *points[1:]]}))["heatmap"]) == 3
    with pytest.raises(InputError, match="no point in range"):
        wrapped(Batch({"id": batch["id"], "points": [*points[:2], far]}))


def test_a_config_file_of_yours_is_run_and_plugins_only_refuses_it(tmp_path: Path) -> None:
    from kd_plugin_mmdet3d.small import pointpillars

    from kdcore import api

    path = tmp_path / "mine.py"
    path.write_text(f"model = {pointpillars(width=8)!r}\n")
    assert type(load_detector(str(path))).__name__ == "VoxelNet"
    overrides = ["data.args.train=4", "data.args.val=2", "data.args.test=2"]
    api.check("mmdet3d:pillars", overrides, plugins_only=True)
    with pytest.raises(InputError, match="names code"):
        api.check("mmdet3d:pillars", [*overrides, f"student.config={path}"], plugins_only=True)


# ---- axes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pointpillars", "centerpoint"])
def test_a_cluster_of_points_is_at_row_y_column_x(name: str, batch: Batch) -> None:
    """Points at x = 20.2, y = -8.2 of an area from (0, -12.8), cells of 0.4 m: column 50, row 11 of the low map."""
    wrapped = student(name).eval()
    cluster = torch.tensor([[20.2, -8.2, -1.0, 0.5]]).repeat(12, 1) + 0.01 * torch.randn(12, 4)
    low = wrapped(Batch({"id": torch.tensor([0]), "points": [cluster]}))["low"]
    assert low.shape[-2:] == (64, 64)
    assert low.abs().sum((0, 1)).nonzero().tolist() == [[11, 50]]


def test_the_cameras_low_map_has_what_it_sees_on_the_left_at_positive_y(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image bright on its left third, carried through in place of features: the volume is filled where y > 0."""
    wrapped = student("imvoxelnet").eval()
    image = torch.zeros(1, 8, 16, 32)
    image[..., :10] = 1.0

    class Given(nn.Module):
        def forward(self, _: Any) -> list[Tensor]:
            return [image]

    wrapped.detector.backbone, wrapped.detector.neck = nn.Identity(), Given()
    single = Batch({k: v[:1] for k, v in batch.items()})
    filled = wrapped(single)["low"][0, 0] > 0
    assert filled.shape == (32, 32)
    rows, columns = filled.nonzero().unbind(1)
    y, x = -12.8 + 0.8 * (rows + 0.5), 0.8 * (columns + 0.5)
    assert len(rows) > 50
    # left of the 10th of 32 columns: u < 40 of 128 pixels, y / x > (64 - 40) / 64; to half a feature cell
    assert (y / x > 24 / 64 - 0.05).all()


@pytest.mark.parametrize("name", DETECTORS)
def test_head_maps_share_the_grid_of_the_area(name: str, batch: Batch) -> None:
    said = student(name).eval()(batch)
    assert said["heatmap"].shape[-2:] == said["regression"].shape[-2:] == said["high"].shape[-2:] == (32, 32)


@pytest.mark.parametrize("name", ["pointpillars", "imvoxelnet"])
def test_a_decoded_box_lies_where_its_logit_is(name: str, batch: Batch) -> None:
    """An impulse in the class logits at row 5, column 27 is decoded to x = 0.8 (27.5), y = -12.8 + 0.8 (5.5)."""
    wrapped = student(name).eval()
    said = wrapped(batch)
    with torch.no_grad():
        said.tensors["head.0"].fill_(-9.0)
        said.tensors["head.0"][0, 0, 5, 27] = 9.0
        said.tensors["head.1"].zero_()
        found = wrapped.infer(said.detach())["boxes"][0]
    assert int((found[:, -1] >= 0).sum()) == 1
    torch.testing.assert_close(found[0, :2], torch.tensor([0.8 * 27.5, -12.8 + 0.8 * 5.5]), atol=0.41, rtol=0)


# ---- configs ----------------------------------------------------------------------------------------------


def test_a_config_of_mmdet3ds_own_by_name_with_options() -> None:
    """PointPillars for KITTI, narrowed; its pretrained weights are not asked for."""
    made = load_detector(
        "pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car",
        options={"backbone.layer_nums": [1, 1, 1]},
    )
    assert type(made).__name__ == "VoxelNet"
    assert len(made.backbone.blocks[2]) == 6  # type: ignore[arg-type, union-attr, index]


def test_weights_that_a_config_wants_downloaded_are_left_out() -> None:
    made = load_detector("imvoxelnet/imvoxelnet_8xb4_kitti-3d-car")
    assert "Pretrained" not in repr(made.backbone.init_cfg)  # type: ignore[union-attr]


def test_a_table_and_a_checkpoint_give_the_same_detector(tmp_path: Path, batch: Batch) -> None:
    from kd_plugin_mmdet3d.small import pointpillars

    first = student("pointpillars").eval()
    torch.save({"state_dict": first.detector.state_dict(), "meta": {"epoch": 1}}, tmp_path / "epoch_1.pth")
    torch.manual_seed(1)
    again = MMDet3DTeacher(config=pointpillars(width=8), checkpoint=str(tmp_path / "epoch_1.pth")).eval()
    assert torch.equal(first(batch)["heatmap"], again(batch)["heatmap"])
    with pytest.raises(InputError, match="another architecture"):
        MMDet3DTeacher(config=pointpillars(width=16), checkpoint=str(tmp_path / "epoch_1.pth"))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"config": "no/such.py"}, "no such config file"),
        ({"config": "no/such"}, "no such config file"),
        ({"config": {"backbone": {}}}, "has no type"),
        ({"config": {"type": "NoDetector"}}, "mmdet3d cannot build it"),
        ({"config": f"{SMALL}:pointpillars", "args": {"width": 5}}, "width"),
        ({"config": "votenet/votenet_8xb8_scannet-3d"}, "no bird's-eye-view detector"),
        ({"config": {"type": "VoxelNet"}, "args": {"width": 4}}, "are for a config that is a function"),
    ],
)
def test_configs_that_do_not_fit_are_refused_in_words(params: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MMDet3DStudent(**params)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    one, two = student("imvoxelnet").state_dict(), student("imvoxelnet").state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert float(one["detector.bbox_head.conv_cls.bias"][0]) == pytest.approx(
        -np.log(99), abs=1e-4
    )  # init_weights ran


# ---- the metric, against the nuScenes devkit --------------------------------------------------------------


def test_average_precision_is_the_nuscenes_devkits() -> None:
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.utils import center_distance
    from nuscenes.eval.detection.algo import accumulate, calc_ap
    from nuscenes.eval.detection.data_classes import DetectionBox

    rng = np.random.default_rng(0)
    true = np.stack([rng.integers(0, 9, 60), np.zeros(60), np.ones(60), *rng.uniform(0, 20, (2, 60))], 1)
    near = true[:40] + np.array([0, 0, 0, 1, 1]) * rng.normal(0, 0.8, (40, 5))
    stray = np.stack([rng.integers(0, 9, 30), np.zeros(30), np.ones(30), *rng.uniform(0, 20, (2, 30))], 1)
    predicted = np.concatenate([near, stray])
    predicted[:, 2] = rng.permutation(70) / 70

    def theirs(rows: Any) -> Any:
        found = EvalBoxes()
        for token in range(9):
            mine = rows[rows[:, 0] == token]
            made = [
                DetectionBox(
                    str(token),
                    (x, y, 0.0),
                    (1, 1, 1),
                    (1, 0, 0, 0),
                    detection_name="car",
                    detection_score=score,
                )
                for _, _, score, x, y in mine.tolist()
            ]
            found.add_boxes(str(token), made)
        return found

    for distance in DISTANCES:
        data = accumulate(theirs(true), theirs(predicted), "car", center_distance, distance)
        assert average_precision(predicted, true, distance) == pytest.approx(
            calc_ap(data, 0.1, 0.1), abs=1e-12
        )


# ---- in a run ---------------------------------------------------------------------------------------------


def test_a_short_run_trains_teacher_and_student_and_judges_both(tmp_path: Path) -> None:
    short = [
        "data.args.train=8",
        "data.args.val=4",
        "data.args.test=4",
        "train.epochs=1",
        "teacher.main.train.epochs=1",
    ]
    run = kdcore.run("mmdet3d:pillars", out=tmp_path / "run", overrides=short)
    metric = "kd_plugin_mmdet3d:NuScenesMAP"
    assert all(0 <= run.results["test"][name][metric] <= 1 for name in ("main", "student"))
    terms = {row["term"] for row in run.results["student"]["guards"]["terms"]}
    assert terms == {"kd", "task.cls", "task.bbox", "task.dir"}


def test_code_size_of_a_centre_head_asks_for_velocities(batch: Batch) -> None:
    wrapped = student("centerpoint")
    assert scene.code_size_of(wrapped.head) == 9
    boxes = scene.sample_of(batch, 0, image=False, code_size=9).gt_instances_3d.bboxes_3d.tensor
    assert boxes.shape[1] == 9
    assert float(boxes[:, 7:].abs().sum()) == 0
    torch.testing.assert_close(boxes[:, :7], batch["boxes"][0, : len(boxes), :7])


def test_the_families_cover_what_the_readme_says() -> None:
    assert list(families.FAMILIES) == ["ImVoxelNet", "MVXTwoStageDetector", "DynamicVoxelNet", "VoxelNet"]


@parametrize("mmdet3d")
def test_conformance(check: Any) -> None:
    found: Finding = check()
    assert not found.failed
