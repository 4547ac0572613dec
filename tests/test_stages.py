"""Stages around the standard one: rounds and collect; and models that are judged beside the student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kdcore import InputError
from kdcore.checkpoint import load_tensors
from kdcore.folder import placed, portable
from kdcore.recipe import parse
from kdcore.rounds import Collect
from kdcore.stages import StageRun


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "student/weights.safetensors", "test")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left)


def test_each_round_is_a_run_of_its_own_seed_and_the_last_one_counts(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["train"]["epochs"] = 1
    tiny["stage"] = [{"use": "rounds", "name": "twice", "count": 2}]
    run = kdcore.run(tiny, out=tmp_path / "rounds")
    first, second = (tmp_path / f"rounds/stages/twice/round-{i}" for i in range(2))
    del tiny["stage"]
    once = kdcore.run(tiny, out=tmp_path / "once", seed=1).folder / "stages/distill"
    assert same(weights(second), weights(once))
    assert not same(weights(first), weights(second))
    assert same(load_tensors(run.student, "test"), load_tensors(second / "student.safetensors", "test"))


def test_rounds_may_change_tables_and_leave_an_artefact_each(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The second stage begins with the student of the first round, although that was not the last."""
    tiny["train"]["epochs"] = 1
    later = {"use": "distill", "name": "later", "student": {"checkpoint": "@twice.student@0"}}
    tables = {"train": {"optimizer": {"use": "SGD", "lr": 0.0}}}
    tiny["stage"] = [{"use": "rounds", "name": "twice", "count": 2, "tables": tables}, later]
    tiny["stage"][1]["train"] = tables["train"]
    kdcore.run(tiny, out=tmp_path / "run")
    stages = tmp_path / "run/stages"
    assert same(weights(stages / "later"), weights(stages / "twice/round-0"))
    assert not same(weights(stages / "later"), weights(stages / "twice/round-1"))


def collected(tree: dict[str, Any], folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    run = StageRun(parse(tree), "collect", folder)
    return load_tensors(Collect(**options).run(run)["outputs"], "test")


def test_collect_keeps_what_a_model_says_behind_its_view(tiny: dict[str, Any], tmp_path: Path) -> None:
    del tiny["teacher"]["main"]["train"]
    plain = collected(tiny, tmp_path / "plain", split="val")
    assert plain["logits"].shape == (len(plain["id"]), 10)
    tiny["teacher"]["main"] |= {"inputs": ["pixels"], "view": {"pixels": "input"}}
    assert same(collected(tiny, tmp_path / "viewed", split="val"), plain)
    students = collected(tiny, tmp_path / "student", model="student", split="val")
    assert torch.equal(students["id"], plain["id"])
    assert not torch.equal(students["logits"], plain["logits"])


@pytest.mark.parametrize(
    ("options", "place"), [({"split": "test"}, "stage.split"), ({"model": "mian"}, "stage.model")]
)
def test_collect_says_what_it_cannot(
    options: dict[str, str], place: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        collected(tiny, tmp_path, **options)
    assert caught.value.place == place


def test_the_baseline_is_judged_behind_the_students_view(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["train"]["epochs"] = 1
    tiny["report"] = {"baseline": True}
    plain = kdcore.run(tiny, out=tmp_path / "plain").results["test"]
    tiny["student"] |= {"inputs": ["pixels"], "view": {"pixels": "input"}}
    assert kdcore.run(tiny, out=tmp_path / "viewed").results["test"] == plain
    assert set(plain) == {"main", "baseline", "student"}


HIDDEN = """
    from torch import nn
    from kdcore import Outputs, Unembed

    class Apart(nn.Module):
        def __init__(self, apart):
            super().__init__()
            self.body, self.head, self.apart = nn.Linear(64, 16), nn.Linear(16, 10), apart

        def forward(self, pixels):
            hidden = self.body(pixels).relu()
            if self.apart == "feature":
                return {"feature": hidden}
            return Outputs(unembed=Unembed(hidden, self.head.weight, self.head.bias))

    def model(*, apart: str = "head"):
        return Apart(apart)
"""


def test_a_teacher_of_hidden_states_and_output_layer_is_judged_as_a_student_is(
    tiny: dict[str, Any], tmp_path: Path, write_module: Callable[..., str]
) -> None:
    both = {"use": "module", "model": f"{write_module(HIDDEN)}:model"}
    tiny["teacher"]["main"], tiny["student"] = {**both, "train": {"epochs": 1}}, both
    tiny["train"] = {"epochs": 1, "optimizer": {"use": "SGD", "lr": 0.1}}
    tiny["task"] = {"metrics": ["accuracy", "auroc"]}
    tiny["loss"] = [{"use": "kd", "weight": 0.0}]
    found = kdcore.run(tiny, out=tmp_path / "run").results["test"]
    assert set(found["main"]) == {"accuracy", "auroc"}
    assert 0 <= found["student"]["agreement_main"] <= 1


def test_a_teacher_of_features_alone_is_not_judged(
    tiny: dict[str, Any], tmp_path: Path, write_module: Callable[..., str]
) -> None:
    module = write_module(HIDDEN)
    tiny["teacher"]["main"] = {"use": "module", "model": f"{module}:model", "args": {"apart": "feature"}}
    reads = {"student": {"feature": "hidden0"}, "teacher": {"feature": "body"}}
    tiny["loss"] = [{"use": "classics.fitnet", "reads": reads}]
    found = kdcore.run(tiny, out=tmp_path / "run").results["test"]
    assert found["main"] == {}
    assert list(found["student"]) == ["accuracy"]


def test_artefacts_are_written_without_the_place_of_the_run_folder(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    given = {"self": run, "file": str(run / "a/b.txt"), "list": [run / "c"], "other": f"{run}-2/d", "n": 3}
    written = portable(given, run)
    assert written == {
        "self": "$RUN/",
        "file": "$RUN/a/b.txt",
        "list": ["$RUN/c"],
        "other": f"{run}-2/d",
        "n": 3,
    }
    found = placed(written, moved)
    assert found["self"] == str(moved)
    assert found["list"] == [str(moved / "c")]
    assert found["other"] == given["other"]
