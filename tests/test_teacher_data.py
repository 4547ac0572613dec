"""``teacher.NAME.data``: a teacher trained on more samples than the student may see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kdcore
from kdcore import InputError
from kdcore.recipe import parse
from kdcore.stages import StageRun


def test_the_teacher_sees_its_own_data_and_the_student_the_recipes(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    """Steps of one epoch of batches of 32: 5 of the teacher's 160 samples, 4 of the student's 100."""
    tiny["teacher"]["main"]["data"] = {"args": {"labels": 160}}
    tiny["train"]["epochs"] = 1
    results = kdcore.run(tiny, out=tmp_path / "run").results
    assert results["teachers"]["main"]["steps"] == 5
    assert results["student"]["steps"] == 4


def test_everything_else_of_the_data_stays(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["teacher"]["main"]["data"] = {"args": {"labels": 160}}
    run = StageRun(parse(tiny), "test", tmp_path)
    theirs = run.of_teacher("main")
    assert (len(theirs.source.streams["main"]), len(run.source.streams["main"])) == (160, 100)
    assert theirs.source.sample()["input"].shape == run.source.sample()["input"].shape == (4, 64)


def test_without_data_the_stage_is_the_same(tiny: dict[str, Any], tmp_path: Path) -> None:
    run = StageRun(parse(tiny), "test", tmp_path)
    assert run.of_teacher("main") is run


@pytest.mark.parametrize(
    "data, place",
    [
        ({"args": {"labels": 10_000}}, "teacher.main.data.args.labels"),
        ({"args": {"lables": 100}}, "teacher.main.data.args.lables"),
        ({"batch": 8}, "teacher.main.data.batch"),
    ],
)
def test_wrong_data_is_named_by_its_place(tiny: dict[str, Any], data: dict[str, Any], place: str) -> None:
    tiny["teacher"]["main"]["data"] = data
    with pytest.raises(InputError) as caught:
        kdcore.check(tiny)
    assert caught.value.place == place


def test_data_of_a_teacher_that_is_not_trained(tiny: dict[str, Any]) -> None:
    del tiny["teacher"]["main"]["train"]
    tiny["teacher"]["main"]["data"] = {"args": {"labels": 160}}
    with pytest.raises(InputError, match="not trained here"):
        kdcore.check(tiny)
