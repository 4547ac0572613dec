"""UniDistill's losses: the authors' numbers, and what the paper says must and must not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kd_plugin_unidistill.component import UniDistill
from kd_plugin_unidistill.geometry import box_mask, nine_points, sample
from kd_plugin_unidistill.loss import feature_loss, relation_loss, response_loss
from kd_plugin_unidistill.oracle import ORACLES
from kd_plugin_unidistill.toy import Grid, grids
from torch import Tensor

from kdcore import Batch, InputError, Outputs
from kdcore.testing.oracle import check_oracle

AREA = (0.0, 0.0, 8.0, 8.0)


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Any) -> None:
    check_oracle(oracle)


def box(
    x: float, y: float, dx: float = 0.0, dy: float = 0.0, yaw: float = 0.0, label: float = 0.0
) -> list[float]:
    return [x, y, 0.0, dx, dy, 1.0, yaw, label]


def boxes(*rows: list[float]) -> Tensor:
    return torch.tensor([list(rows)], dtype=torch.float64)


def maps(seed: int, channels: int = 3) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((1, channels, 8, 8)))


# ---- where the maps are read ----------------------------------------------------------------------------


@pytest.mark.parametrize(("swapped", "found"), [(False, 1.0), (True, 0.0)])
def test_an_impulse_is_read_at_its_own_cell_and_not_at_its_mirror(swapped: bool, found: float) -> None:
    """Row y = 2, column x = 6: a degenerate box at the cell's centre (6.5, 2.5) sees it; the released code does not."""
    impulse = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    impulse[0, 0, 2, 6] = 1.0
    at, mirror = (
        sample(impulse, nine_points(boxes(box(*p))), AREA, swapped=swapped) for p in ((6.5, 2.5), (2.5, 6.5))
    )
    torch.testing.assert_close(at, torch.full_like(at, found))
    torch.testing.assert_close(mirror, torch.full_like(mirror, 1 - found))


def test_the_nine_points_of_a_turned_box() -> None:
    """Length 4, width 2, turned by a quarter: length along y."""
    found = nine_points(boxes(box(3.0, 5.0, 4.0, 2.0, math.pi / 2)))[0, 0]
    corners = {(4.0, 3.0), (2.0, 3.0), (2.0, 7.0), (4.0, 7.0)}
    edges = {(3.0, 3.0), (2.0, 5.0), (3.0, 7.0), (4.0, 5.0)}
    rounded = {(round(x, 6), round(y, 6)) for x, y in found.tolist()}
    assert rounded == corners | edges | {(3.0, 5.0)}


def test_maps_of_other_resolution_are_read_at_the_same_place() -> None:
    """A linear map has the same values at 8 and at 16 cells, away from the border."""
    fine, coarse = (
        ((torch.arange(n, dtype=torch.float64) + 0.5) * (8 / n)).expand(1, 1, n, n).contiguous()
        for n in (16, 8)
    )
    points = nine_points(boxes(box(4.1, 3.7, 3.0, 2.0, 0.3)))
    read = sample(fine, points, AREA)
    torch.testing.assert_close(read, sample(coarse, points, AREA))
    torch.testing.assert_close(read[..., 0], points[..., 0])


def test_the_teachers_area_may_be_another() -> None:
    """The same features on a map that begins 4 m earlier in x: nothing is left to learn."""
    student, row = maps(1), boxes(box(4.0, 4.0, 2.0, 2.0))
    teacher = torch.cat([torch.zeros(1, 3, 8, 4, dtype=torch.float64), student], -1)
    assert float(feature_loss(student, teacher, row, area=AREA)) > 0.01
    assert float(feature_loss(student, teacher, row, area=AREA, teacher_area=(-4.0, 0.0, 8.0, 8.0))) < 1e-12


# ---- the feature and relation losses --------------------------------------------------------------------


def test_equal_maps_leave_nothing_but_the_class_term() -> None:
    """The teacher's temperature of 2 keeps L_cls above 0 at equal logits."""
    f, row = maps(2), boxes(box(4.0, 4.0, 3.0, 2.0, 0.4))
    assert float(feature_loss(f, f, row, area=AREA)) == 0
    assert float(relation_loss(f, f, row, area=AREA)) == 0
    found = response_loss(f, f, row, f, f, area=AREA)
    assert float(found["reg"]) == 0
    assert float(found["cls"]) > 1e-3
    zero = torch.zeros_like(f)
    assert float(response_loss(zero, zero, row, f, f, area=AREA)["cls"]) == 0


def test_gradient_reaches_the_student_alone_through_the_component() -> None:
    names = {"low": 3, "high": 3, "heatmap": 2, "regression": 4}
    student, teacher = (
        Outputs(tensors={n: maps(s + i, c).requires_grad_() for i, (n, c) in enumerate(names.items())})
        for s in (10, 20)
    )
    terms = UniDistill(area=AREA)(student, teacher, Batch({"boxes": boxes(box(4.0, 4.0, 3.0, 2.0))}))
    assert set(terms) == {"feature", "relation", "response_cls", "response_reg"}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(student[name].grad.abs().sum() > 0 for name in names)
    assert all(teacher[name].grad is None for name in names)


def test_relations_see_directions_and_not_lengths() -> None:
    """Scaled by 7, or turned by an orthogonal matrix, the student's relations are the same; features are not."""
    student, teacher, row = maps(3, 4), maps(4, 6), boxes(box(4.0, 4.0, 3.0, 2.0, 0.4))
    plain = relation_loss(student, teacher, row, area=AREA)
    turn = torch.linalg.qr(maps(5, 4)[0, 0, :4, :4])[0]
    turned = torch.einsum("dc,bchw->bdhw", turn, student)
    torch.testing.assert_close(relation_loss(7 * student, teacher, row, area=AREA), plain, rtol=1e-3, atol=0)
    torch.testing.assert_close(relation_loss(turned, teacher, row, area=AREA), plain)
    same = maps(6, 4)
    assert not torch.isclose(
        feature_loss(7 * student, same, row, area=AREA), feature_loss(student, same, row, area=AREA)
    )


def test_a_boxs_share_does_not_depend_on_its_size() -> None:
    """A constant gap of 0.3 over a small and a large box: each contributes 0.3."""
    student = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    for row in (box(4.0, 4.0, 1.0, 1.0), box(4.0, 4.0, 5.0, 3.0)):
        found = feature_loss(student, student + 0.3, boxes(row), area=AREA)
        torch.testing.assert_close(found, torch.tensor(0.3 / (1 + 1e-4), dtype=torch.float64))


def test_the_background_does_not_matter() -> None:
    """Cells farther than one from every point can hold anything."""
    student, teacher, row = maps(7), maps(8), boxes(box(2.0, 2.0, 1.0, 1.0))
    changed = student.clone()
    changed[..., 4:, :] += 5.0
    changed[..., 4:] -= 3.0
    for loss in (feature_loss, relation_loss):
        torch.testing.assert_close(
            loss(changed, teacher, row, area=AREA), loss(student, teacher, row, area=AREA)
        )


def test_a_point_outside_the_map_has_no_relation_and_a_finite_gradient() -> None:
    student = maps(9).requires_grad_()
    loss = relation_loss(
        student, maps(10), boxes(box(-30.0, 4.0, 2.0, 2.0), box(4.0, 4.0, 2.0, 2.0)), area=AREA
    )
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert float(relation_loss(maps(9), maps(10), boxes(box(-30.0, 4.0, 2.0, 2.0)), area=AREA)) == 0


def test_padding_is_no_box_unless_released() -> None:
    """Paper: a sample without boxes adds nothing. Released: one box at the origin, here the corner of the area."""
    student, teacher, none = maps(11), maps(12), boxes(box(3.0, 3.0, 1.0, 1.0, label=-1.0))
    assert float(feature_loss(student, teacher, none, area=AREA)) == 0
    corner = sample(student - teacher, nine_points(boxes(box(0.0, 0.0))), AREA).abs().mean()
    released = feature_loss(student, teacher, none, area=AREA, variant="released")
    torch.testing.assert_close(released, corner / (1 + 1e-4))


# ---- the response loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "cells"),
    [((4.0, 2.0), 1), ((7.5, 3.2), 9)],  # CenterNet's radius: 0.736 -> 0, 1.24 -> 1
)
def test_the_mask_is_one_cell_or_nine(size: tuple[float, float], cells: int) -> None:
    mask = box_mask(boxes(box(4.5, 3.5, *size)), AREA, (8, 8))
    assert int((mask > 0).sum()) == cells
    assert float(mask[0, 3, 4]) == 1.0
    if cells == 9:  # sigma = 3 / 6
        torch.testing.assert_close(mask[0, 3, 5], torch.tensor(math.exp(-2.0), dtype=torch.float64))


def test_boxes_outside_and_padding_leave_no_mask() -> None:
    rows = boxes(box(-0.5, 4.0, 4.0, 2.0), box(4.0, 8.5, 4.0, 2.0), box(4.0, 4.0, 4.0, 2.0, label=-1.0))
    assert float(box_mask(rows, AREA, (8, 8)).sum()) == 0


def test_the_mask_has_rows_along_y_and_the_areas_own_cells() -> None:
    mask = box_mask(boxes(box(7.0, 1.0, 1.0, 1.0)), AREA, (4, 8))  # cells of 1 m in x and 2 m in y
    assert mask[0].nonzero().tolist() == [[0, 7]]


def test_only_the_largest_class_is_compared() -> None:
    student, teacher = torch.full((1, 2, 8, 8), -9.0), torch.full((1, 2, 8, 8), -9.0)
    student[0, 0, 4, 4], teacher[0, 1, 4, 4] = (
        1.0,
        2.0,
    )  # other classes, the same probability at temperature 2
    found = response_loss(student, teacher, boxes(box(4.5, 4.5, 2.0, 1.0)), student, student, area=AREA)
    assert float(found["cls"]) < 1e-6


# ---- the component --------------------------------------------------------------------------------------


def test_a_weight_of_zero_leaves_its_maps_unread() -> None:
    assert UniDistill(area=AREA, feature=0, relation=0).wants() == (
        "student.heatmap",
        "student.regression",
        "teacher.heatmap",
        "teacher.regression",
    )
    assert UniDistill(area=AREA, feature=0, response=0).wants() == ("student.high", "teacher.high")
    assert "student.regression" not in UniDistill(area=AREA, regression=False).wants()


def test_weights_are_the_terms_factors() -> None:
    student, teacher = ({"low": maps(s), "high": maps(s + 1)} for s in (1, 3))
    sides = Outputs(tensors=student), Outputs(tensors=teacher)
    batch = Batch({"boxes": boxes(box(4.0, 4.0, 3.0, 2.0))})
    found = UniDistill(area=AREA, feature=3, relation=0.5, response=0)(*sides, batch)
    torch.testing.assert_close(
        found["feature"], 3 * feature_loss(student["low"], teacher["low"], batch["boxes"], area=AREA)
    )
    torch.testing.assert_close(
        found["relation"], 0.5 * relation_loss(student["high"], teacher["high"], batch["boxes"], area=AREA)
    )


def test_an_area_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="rectangle"):
        UniDistill(area=(0.0, 8.0, 8.0, 0.0))


class Preview:
    """A run that shows a loss two sides' maps."""

    def __init__(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        self.sides = Outputs(tensors=student), Outputs(tensors=teacher)

    def preview(self, loss: UniDistill) -> tuple[Outputs, Outputs]:
        return self.sides


@pytest.mark.parametrize(
    ("adapter", "channels", "made"), [(None, 5, True), (None, 3, False), (True, 3, True)]
)
def test_an_adapter_is_made_where_channels_differ_or_it_is_asked_for(
    adapter: bool | None, channels: int, made: bool
) -> None:
    loss = UniDistill(area=AREA, relation=0, response=0, adapter=adapter)
    loss.run = Preview({"low": maps(1)}, {"low": maps(2, channels)})  # type: ignore[assignment]
    loss.setup()
    assert isinstance(loss.adapter, torch.nn.Conv2d) == made
    if made:
        assert loss.adapter(maps(1).float()).shape == (1, channels, 8, 8)


@pytest.mark.parametrize(
    ("options", "name", "teacher", "words"),
    [
        ({"adapter": False}, "low", maps(2, 5), "5 channels, the student's 3"),
        ({}, "heatmap", maps(2)[..., :4, :4], "the heads' maps differ"),
        ({}, "regression", maps(2, 5), "regress different channels"),
    ],
)
def test_maps_that_do_not_fit_are_refused_before_training(
    options: dict[str, Any], name: str, teacher: Tensor, words: str
) -> None:
    loss = UniDistill(area=AREA, **options)
    same = dict.fromkeys(("low", "high", "heatmap", "regression"), maps(1))
    loss.run = Preview(same, {**same, name: teacher})  # type: ignore[assignment]
    with pytest.raises(InputError, match=words):
        loss.setup()


@pytest.mark.parametrize("term", ["feature", "relation", "response"])
def test_each_loss_closes_its_gap_on_held_out_scenes(term: str) -> None:
    """In a loop of one's own, on the toy: a camera grid taught by a LiDAR grid, 30 steps, other scenes."""
    torch.manual_seed(0)
    area, data = (0.0, 0.0, 20.0, 20.0), grids(train=12, val=12, test=8)
    teacher, student = Grid(width=8).requires_grad_(False), Grid(width=8)
    for parameter in teacher.parameters():
        parameter.mul_(2)  # an untrained one says nearly the same everywhere

    def gap(split: Any) -> Tensor:
        batch = split.batch(torch.arange(12))
        s, t = student(batch["camera"]), teacher(batch["lidar"])
        if term == "feature":
            return feature_loss(s["low"], t["low"], batch["boxes"], area=area)
        if term == "relation":
            return relation_loss(s["high"], t["high"], batch["boxes"], area=area)
        same = s["heatmap"].detach()
        return response_loss(s["heatmap"], t["heatmap"], batch["boxes"], same, same, area=area)["cls"]

    before, optimiser = float(gap(data.val).detach()), torch.optim.Adam(student.parameters(), 1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        gap(data.train).backward()
        optimiser.step()
    assert float(gap(data.val).detach()) < 0.8 * before


def test_the_toys_camera_sees_less_than_its_lidar() -> None:
    """The blurred grid correlates less with the boxes; inputs and boxes agree on which axis is x."""
    batch = grids(train=32, val=8, test=8).train.batch(torch.arange(32))
    inside = batch["target"].float()

    def agreement(name: str) -> float:
        return float(torch.corrcoef(torch.stack([batch[name][:, 0].flatten(), inside.flatten()]))[0, 1])

    assert agreement("camera") < 0.7 < agreement("lidar")
    values = sample(inside[:, None], nine_points(batch["boxes"]), (0.0, 0.0, 20.0, 20.0))
    assert float(values[:, :, 4].mean()) > 0.9  # the centres are in the boxes
