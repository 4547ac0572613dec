"""With mmdet3d installed (`make test-mmdet3d`): the losses between LiDAR, camera and fusion detectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kd_plugin_mmdet3d.models import MMDet3DStudent, MMDet3DTeacher
from kd_plugin_mmdet3d.synthetic import AREA, scenes
from kd_plugin_unidistill.component import UniDistill
from kd_plugin_unidistill.geometry import nine_points, sample

import kdcore
from kdcore import Batch, InputError, Outputs

SMALL = "kd_plugin_mmdet3d.small"
PATHS = [  # the paper's four, teacher to student, and LiDAR to LiDAR
    ("pointpillars", "imvoxelnet"),
    ("mvxnet", "imvoxelnet"),
    ("imvoxelnet", "pointpillars"),
    ("mvxnet", "pointpillars"),
    ("centerpoint", "centerpoint"),
]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(scenes(train=2, val=1, test=1).train.batch(torch.arange(2)))


class Preview:
    """A run that shows a loss what two detectors say of a batch."""

    def __init__(self, student: MMDet3DStudent, teacher: MMDet3DTeacher, batch: Batch) -> None:
        self.models, self.batch = (student, teacher), batch

    def preview(self, loss: UniDistill) -> tuple[Outputs, Outputs]:
        student, teacher = self.models
        return student(self.batch), teacher(self.batch)


def pair(teacher: str, student: str, batch: Batch, **options: Any) -> tuple[UniDistill, Preview]:
    torch.manual_seed(0)
    one = MMDet3DStudent(config=f"{SMALL}:{student}", args={"width": 8}).train()
    two = MMDet3DTeacher(config=f"{SMALL}:{teacher}", args={"width": 16}).eval().requires_grad_(False)
    loss, run = UniDistill(area=AREA, **options), Preview(one, two, batch)
    loss.run = run  # type: ignore[assignment]
    loss.setup()
    return loss, run


@pytest.mark.parametrize(("teacher", "student"), PATHS)
def test_every_path_gives_four_terms_with_gradient(teacher: str, student: str, batch: Batch) -> None:
    """Gradient of each term reaches what makes its maps, beginning with the sensor's own layers."""
    loss, run = pair(teacher, student, batch)
    said, told = run.preview(loss)
    terms = loss(said, told, batch)
    assert set(terms) == {"feature", "relation", "response_cls", "response_reg"}
    parameters = dict(run.models[0].detector.named_parameters())
    sensor = next(n for n in parameters if "voxel_encoder" in n or n == "backbone.conv1.weight")
    for name, term in terms.items():
        assert 0 < float(term.detach()) < 1e3
        found = torch.autograd.grad(term, list(parameters.values()), retain_graph=True, allow_unused=True)
        reached = {n for n, g in zip(parameters, found, strict=True) if g is not None and g.abs().sum() > 0}
        assert sensor in reached
        assert any("head" in n for n in reached) == name.startswith("response")


@pytest.mark.parametrize(("variant", "seen"), [("paper", True), ("released", False)])
def test_a_box_is_read_where_its_points_are_and_released_at_its_mirror(variant: str, seen: bool) -> None:
    """A cluster at x = 20.2, y = -8.2: the pillars' map is 0 elsewhere, so only a right reading finds it."""
    torch.manual_seed(0)
    detector = MMDet3DStudent(config=f"{SMALL}:pointpillars", args={"width": 8}).eval()
    cluster = torch.tensor([[20.2, -8.2, -1.0, 0.5]]).repeat(12, 1) + 0.01 * torch.randn(12, 4)
    low = detector(Batch({"id": torch.tensor([0]), "points": [cluster]}))["low"]
    box = torch.tensor([[[20.2, -8.2, -1.6, 0.1, 0.1, 1.0, 0.0, 0.0]]])
    found = sample(low, nine_points(box), AREA, swapped=variant == "released")
    assert (float(found.detach().abs().sum()) > 0) == seen


def test_heads_that_do_not_fit_each_other_are_refused_in_words(batch: Batch) -> None:
    with pytest.raises(InputError, match="regress different channels"):
        pair("centerpoint", "pointpillars", batch)
    loss, run = pair("centerpoint", "pointpillars", batch, regression=False)
    assert "response_cls" in loss(*run.preview(loss), batch)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("lidar", []),
        ("camera", []),
        ("camera", [f"teacher.main.config={SMALL}:mvxnet"]),
        ("lidar", ["loss.0.variant=released"]),
    ],
)
def test_recipes_pass_every_check_before_a_run(recipe: str, overrides: list[str]) -> None:
    small = ["data.args.train=8", "data.args.val=4", "data.args.test=4"]
    kdcore.check(f"unidistill:{recipe}", overrides=[*small, *overrides])


def test_a_short_run_teaches_a_camera(tmp_path: Any) -> None:
    """Two steps of each: all terms are there, alive or not, and the student's predictions are judged."""
    short = [
        "data.args.train=4",
        "data.args.val=4",
        "data.args.test=4",
        "train.epochs=2",
        "teacher.main.train.epochs=1",
    ]
    run = kdcore.run("unidistill:camera", out=tmp_path / "run", overrides=short)
    terms = {row["term"] for row in run.results["student"]["guards"]["terms"]}
    assert {f"unidistill.{n}" for n in ("feature", "relation", "response_cls", "response_reg")} < terms
    assert 0 <= run.metrics["kd_plugin_mmdet3d:NuScenesMAP"] <= 1
