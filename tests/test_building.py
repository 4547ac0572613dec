"""What is made of a recipe: the student's trained and held parts, and places that components know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kdcore import InputError
from kdcore.building import Builder, assemble, make_student
from kdcore.kinds import evaluating
from kdcore.optimizers import trainable
from kdcore.recipe import parse
from kdcore.shipping import load_student
from kdcore.stages import StageRun

NET = {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"width": 4}}


def test_what_is_held_in_eval_mode_stays_there_when_the_student_was_judged(tiny: dict[str, Any]) -> None:
    tiny["student"] = {**NET, "hold_eval": ["*.body.0"]}
    student = make_student(parse(tiny), Builder(0))
    with evaluating(student.train()):
        pass
    modes = {name: module.training for name, module in student.named_modules() if name}
    assert not any(mode for name, mode in modes.items() if ".body.0" in name)
    assert all(mode for name, mode in modes.items() if ".body.0" not in name)


def test_held_batch_norm_keeps_its_statistics_through_a_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    """With a teacher that asks the student itself in the middle of each step, which switches modes."""
    tiny["data"]["args"]["flat"] = False
    tiny["student"] = {**NET, "hold_eval": ["*"]}
    tiny["teacher"] = {"main": {"use": "self", "weights": "current"}}
    tiny["train"]["epochs"] = 1
    student, _ = load_student(kdcore.run(tiny, out=tmp_path / "run").folder)
    assert all(bool((b == 0).all()) for n, b in student.named_buffers() if n.endswith("running_mean"))


def test_only_what_matches_is_trained(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["student"]["train"] = ["*head*"]
    run = StageRun(parse(tiny), "test", tmp_path)
    parts = assemble(run.recipe, run.source, run.builder())
    head = parts.student.module.head
    assert {id(p) for p in trainable(parts)} == {id(head.weight), id(head.bias)}


@pytest.mark.parametrize("key", ["train", "hold_eval"])
def test_patterns_that_match_nothing(key: str, tiny: dict[str, Any]) -> None:
    tiny["student"][key] = ["haed*"]
    with pytest.raises(InputError, match="nothing matches") as caught:
        make_student(parse(tiny), Builder(0))
    assert caught.value.place == f"student.{key}"


def test_nothing_left_to_train(tiny: dict[str, Any]) -> None:
    tiny["student"]["train"] = []
    with pytest.raises(InputError, match="nothing is left to train"):
        kdcore.check(tiny)


def test_components_know_their_places(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["loss"].append({"use": "classics.fitnet", "reads": {"student": {"feature": "hidden0"}}})
    run = StageRun(parse(tiny), "test", tmp_path)
    parts = assemble(run.recipe, run.source, run.builder())
    assert [c.place for _, c in parts.components()] == ["student", "teacher.main", "loss.0", "loss.1"]


def test_two_losses_of_one_name_are_numbered(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["loss"] = [{"use": "classics.at"}, {"use": "classics.at"}, {"use": "kd", "name": "classics-at-2"}]
    run = StageRun(parse(tiny), "test", tmp_path)
    names = [slot.name for slot in assemble(run.recipe, run.source, run.builder()).losses]
    assert names == ["classics-at", "classics-at-2", "classics-at-2-2"]


CLUMSY = """
    from kdcore import KDError, Loss

    class Clumsy(Loss):
        def __init__(self, *, where: str):
            super().__init__()
            self.where = where

        def setup(self):
            self.fail("setup")

        def forward(self, student, teacher, batch):
            self.fail("forward")
            return student["nothing"]

        def fail(self, here):
            if here == self.where:
                raise KDError("in its own words")
"""


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("setup", "its setup fails: in its own words"),
        ("forward", "fails on its first batch: in its own words"),
        ("", "fails on its first batch: the model gives no 'nothing'"),
    ],
)
def test_what_a_component_raises_is_bad_input_in_its_words(
    where: str,
    words: str,
    tiny: dict[str, Any],
    install: Callable[..., Any],
    write_module: Callable[..., str],
) -> None:
    module = write_module(CLUMSY)
    hook = f"""
        from kdcore import Component, hookimpl
        @hookimpl
        def kd_losses():
            yield Component("clumsy", "{module}:Clumsy")
    """
    install("clumsy", hook)
    tiny["loss"] = [{"use": "clumsy", "where": where}]
    with pytest.raises(InputError, match=words):
        kdcore.check(tiny)


def test_a_batch_that_the_exported_graph_can_never_take(tiny: dict[str, Any]) -> None:
    tiny["student"]["export_batch"] = [8, 4]
    with pytest.raises(InputError, match="the fewest are more") as caught:
        kdcore.check(tiny)
    assert caught.value.place == "student.export_batch"


def test_a_graph_takes_what_input_names_say() -> None:
    class Named(kdcore.Student):
        input_names = ("pixels",)

        def forward(self, batch: kdcore.Batch) -> kdcore.Outputs:
            return kdcore.Outputs(batch["pixels"])

    pixels = torch.ones(2, 3)
    student, batch = Named(), kdcore.Batch({"id": torch.arange(2), "pixels": pixels})
    assert student.inputs(batch) == {"pixels": pixels}
    assert student.deploy()(pixels)["logits"] is pixels
    with pytest.raises(InputError, match="not what the graph takes") as caught:
        student.inputs(kdcore.Batch({"id": torch.arange(2)}))
    assert "or write inputs(batch), in Named" in str(caught.value)
