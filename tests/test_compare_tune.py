"""The search: the same for every arm, seeded, on val, and never within sight of the test split."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kdcore
from kdcore.comparison.runs import Job, without_test
from kdcore.comparison.tune import changed, hide_test, search, spaces
from kdcore.errors import InputError, RunError
from kdcore.recipe import parse

WATCHED = """
    from kdcore.datasets import TensorSet, digits

    READ = []

    class Watched(TensorSet):
        def batch(self, index):
            READ.append(len(index))
            return super().batch(index)

    def data(*, labels: int = 100):
        found = digits(labels=labels, flat=True)
        values = dict(found.test.values)
        found.test = Watched(values.pop("id"), **values)
        return found
"""


def test_a_search_reads_no_test_split_and_repeats_itself(
    tiny: dict[str, Any], tmp_path: Path, write_module: Callable[..., str]
) -> None:
    module = write_module(WATCHED)
    tiny["data"] = {"source": f"{module}:data", "args": {"labels": 60}, "batch_size": 32}
    tiny |= {"seed": 7, "report": {"guards": True}}
    tiny["train"]["threads"] = 1
    room = {"train.optimizer.lr": [1e-6, 1e-1], "loss.0.weight": [0.1, 1.0]}
    jobs = [Job("a", hide_test(tiny), tmp_path / name, str(tmp_path)) for name in "ab"]

    def found(job: Job) -> dict[str, Any]:
        return search(job, {"a": room}, 3, "accuracy")

    first = found(jobs[0])
    assert __import__(module).READ == []
    assert [set(t["values"]) for t in first["trials"]] == [set(), set(room), set(room)]
    assert first["val"] == max(t["val"] for t in first["trials"])
    lock = tmp_path / "a/trial-2/results.json"
    time = lock.stat().st_mtime_ns
    assert found(jobs[0]) == first == found(jobs[1])
    assert lock.stat().st_mtime_ns == time
    kdcore.run(tiny, out=tmp_path / "run")
    assert __import__(module).READ != []


def test_what_stands_in_for_test_is_val() -> None:
    hidden = without_test(source="kdcore.datasets:digits", args={"labels": 50})
    whole = kdcore.datasets.digits(labels=50)
    assert hidden.test.values["id"].tolist() == whole.val.values["id"].tolist()
    assert not set(hidden.test.values["id"].tolist()) & set(whole.test.values["id"].tolist())


def test_what_is_laid_over_the_data_is_hidden_too(tiny: dict[str, Any]) -> None:
    tiny["teacher"]["main"]["data"] = {"args": {"labels": 200}, "batch_size": 8}
    tiny["stage"] = [{"use": "distill", "data": {"source": "other:data"}}]
    out = hide_test(tiny)
    wrapper = "kdcore.comparison.runs:without_test"
    inner = {"source": "kdcore.datasets:digits", "args": {"labels": 100, "flat": True}}
    assert out["data"] == {"source": wrapper, "args": inner, "batch_size": 32}
    assert out["teacher"]["main"]["data"] == {"args": {"args": {"labels": 200}}, "batch_size": 8}
    assert out["stage"][0]["data"] == {"source": wrapper, "args": {"source": "other:data"}}
    assert hide_test({"data": {"use": "ids", "count": 4}}) == {"data": {"use": "ids", "count": 4}}


def test_every_arm_gets_the_same_trials_and_its_best_values(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["teacher"]["main"]["data"] = {"args": {"labels": 200}}
    tiny["train"] = {"epochs": 4, "optimizer": {"use": "AdamW", "lr": 1e-7}}  # whatever is tried is better
    found = kdcore.compare(
        tiny, seeds=2, tune=2, space=["train.optimizer.lr=[0.03, 0.04]"], out=tmp_path / "c"
    )
    record = json.loads((tmp_path / "c/compare.json").read_text("utf-8"))
    assert {arm: len(s["trials"]) for arm, s in record["searches"].items()} == {"none": 2, "kd": 2, "tiny": 2}
    for arm, tuned in record["searches"].items():
        rate = record["recipes"][arm]["train"]["optimizer"]["lr"]
        assert tuned["values"] == {"train.optimizer.lr": rate}
        assert 0.03 <= rate <= 0.04
        assert "lr = 0.03" in (tmp_path / f"c/runs/{arm}/seed-1/recipe.lock.toml").read_text("utf-8")
    assert all(row["matched"] for row in found.table)  # what was searched for every arm is no unfairness
    assert "## Search" in found.markdown
    trial = parse(json.loads((tmp_path / "c/plan.json").read_text("utf-8"))["arms"]["tiny"])
    assert trial.train.optimizer.params["lr"] == 1e-7


def test_spaces_are_an_arms_own(tiny: dict[str, Any]) -> None:
    trees = {
        "kd": tiny,
        "none": {k: v for k, v in tiny.items() if k != "loss"},
        "task": {**tiny, "loss": [{"use": "task"}]},
    }
    around = spaces(trees, [])
    assert around["none"] == {"train.optimizer.lr": pytest.approx([2e-4, 2e-2])}
    assert around["kd"]["loss.0.weight"] == pytest.approx([0.09, 9.0])
    declared = spaces(
        trees,
        ["loss.0.temperature=[1, 8]", "loss.0.weight=[0.5, 2.0]", 'train.schedule.use=["cosine", "linear"]'],
    )
    schedule = {"train.schedule.use": ["cosine", "linear"]}
    assert declared["none"] == schedule
    assert declared["task"] == {"loss.0.weight": [0.5, 2.0], **schedule}
    assert declared["kd"] == {"loss.0.temperature": [1, 8], "loss.0.weight": [0.5, 2.0], **schedule}


@pytest.mark.parametrize("text", ["train.optimizer.lr", "lr=[1]", "lr=[2, 1]", "lr=0.1", "lr=nonsense"])
def test_spaces_that_are_none(tiny: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match="no range"):
        spaces({"tiny": tiny}, [text])


def test_values_are_put_in_place(tiny: dict[str, Any]) -> None:
    out = changed(tiny, {"loss.0.weight": 1.5e-05, "train.schedule.use": "linear", "data.batch_size": 16})
    assert out["loss"][0]["weight"] == 1.5e-05
    assert out["train"]["schedule"] == {"use": "linear"}
    assert out["data"]["batch_size"] == 16
    assert tiny["data"]["batch_size"] == 32


def test_choices_are_what_they_are_and_a_trial_of_bad_input_fails_alone(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    assert changed(tiny, {"train.optimizer.amsgrad": True})["train"]["optimizer"]["amsgrad"] is True
    tiny |= {"seed": 0, "train": {"steps": 2, "threads": 1, "optimizer": {"use": "AdamW"}}}
    job = Job("a", hide_test(tiny), tmp_path / "a", str(tmp_path))
    room = spaces({"a": tiny}, ["train.optimizer.amsgrad=[true, false]", "data.batch_size=[0, 16, 32]"])
    found = search(job, room, 6, "accuracy")
    values = [(trial["values"], trial["val"]) for trial in found["trials"][1:]]
    assert {type(each["train.optimizer.amsgrad"]) for each, _ in values} == {bool}
    assert {each["data.batch_size"] == 0 for each, value in values if value is None} == {True}
    assert all(each["data.batch_size"] > 0 for each, value in values if value is not None)
    with pytest.raises(RunError, match=r"every trial failed: train\.optimizer\.lrr: unknown"):
        search(replace(job, folder=tmp_path / "b"), {"a": {"train.optimizer.lrr": [0.1, 0.2]}}, 3, "accuracy")
