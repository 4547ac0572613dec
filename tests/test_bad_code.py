"""What a recipe's own code and data do wrong: said in words, with the place, and never taken for a run that is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import kdcore
from kdcore import cli
from kdcore.errors import InputError, RunError

OWN = """
    import sys
    import torch
    from torch import nn
    from kdcore.datasets import TensorSet, digits

    def exits():
        sys.exit(0)

    class Items:
        def __init__(self, inner, bad):
            self.inner, self.bad = inner, bad

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            if index == self.bad:
                raise ValueError("corrupt jpeg")
            return self.inner[index]

    def corrupt(*, split: str = "train", index: int = 33):
        data = digits(labels=100, flat=True)
        setattr(data, split, Items(getattr(data, split), index))
        return data

    def changed(*, how: str):
        data = digits(labels=100, flat=True)
        for values in (each.values for each in (data.train, data.val, data.test)):
            if how == "no target":
                del values["target"]
            elif how == "nan":
                values["input"][:] = float("nan")
            elif how == "too large":
                values["target"][0] = 12
            elif how == "negative":
                values["target"][0] = -1
            elif how == "same id":
                values["id"] = torch.zeros_like(values["id"])
            else:
                values["target"] = values["target"].to(getattr(torch, how))
        return data

    def judged_late():
        data = digits(labels=100, flat=True)
        data.val.values["target"][33] = 12
        return data

    def overlapping(*, how: str):
        data = digits(labels=100, flat=True)
        if how == "the same":
            data.val = data.test = data.train
        elif how == "items":
            data.val = data.test = Items(data.train, -1)
        elif how == "shared":
            rows = torch.arange(90, 190) % 100
            kept = {key: value[rows] for key, value in data.train.values.items()}
            data.val = data.test = TensorSet(kept.pop("id"), **kept)
        else:
            for each in (data.train, data.val, data.test):
                each.values["id"] = torch.arange(len(each))
        return data

    class Poisoned(nn.Linear):
        def __init__(self):
            super().__init__(64, 10)
            nn.init.constant_(self.weight, float("nan"))

    class Batches(Items):
        def batch(self, index):
            if self.bad in index.tolist():
                sys.exit(0)
            return self.inner.batch(index)

    def leaving():
        data = digits(labels=100, flat=True)
        data.train = Batches(data.train, 33)
        return data
"""


@pytest.fixture
def own(write_module: Callable[..., str]) -> str:
    return write_module(OWN)


@pytest.mark.parametrize("place", ["data.source", "student.model", "teacher.main.model"])
@pytest.mark.parametrize("option", ["--check", "--quiet"])
def test_code_that_exits_is_no_run_that_is_done(
    place: str,
    option: str,
    own: str,
    tiny: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, args = tmp_path / "recipe.toml", place.replace("source", "model").replace("model", "args")
    recipe.write_text(tomli_w.dumps(tiny), "utf-8")
    with pytest.raises(SystemExit) as left:
        cli.main(
            ["run", str(recipe), option, f"{place}={own}:exits", f"{args}={{}}", "--out", str(tmp_path / "o")]
        )
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert place.rpartition(".")[0] in said
    assert "SystemExit: 0" in said
    assert not (tmp_path / "o").exists()


def test_code_that_exits_in_the_middle(own: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"] |= {"source": f"{own}:leaving", "args": {}}
    with pytest.raises(RunError, match=r"samples .* of 'train': SystemExit: 0"):
        kdcore.run(tiny, out=tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_fails_in_the_middle_has_its_number(
    workers: int, own: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["data"] |= {"source": f"{own}:corrupt", "args": {}, "workers": workers}
    for resume in (False, True):
        with pytest.raises(RunError, match="sample 33 of 'train': ValueError: corrupt jpeg") as caught:
            kdcore.run(tiny, out=tmp_path / "run", resume=resume)
        assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_sample_of_another_split_fails(split: str, own: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"] |= {"source": f"{own}:corrupt", "args": {"split": split}}
    with pytest.raises(RunError, match=f"sample 33 of '{split}': ValueError: corrupt jpeg"):
        kdcore.run(tiny, out=tmp_path / "run")


def test_a_first_sample_that_fails_is_wrong_input(own: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"] |= {"source": f"{own}:corrupt", "args": {"index": 2}}
    with pytest.raises(
        InputError, match=r"data\.source: [\s\S]*sample 2 of 'train': ValueError: corrupt jpeg"
    ):
        kdcore.check(tiny)


def refused(recipe: dict[str, Any]) -> str:
    """What a check says that refuses a recipe."""
    with pytest.raises(InputError) as caught:
        kdcore.check(recipe)
    return str(caught.value)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_loss_that_reads_a_module_says_how_it_is_named(side: str, tiny: dict[str, Any]) -> None:
    tiny["loss"] = [{"use": "classics.fitnet", "reads": {"student": {"feature": "hidden0"}}}]
    if side == "student":
        tiny["loss"][0]["reads"] = {"teacher": {"feature": "hidden0"}}
    said = refused(tiny)
    assert said.startswith(f"loss.0.reads.{side}.feature: ")
    assert "hidden0.1, head" in said
    assert f'reads.{side}.feature = "PATH"' in said


def test_a_function_that_reads_a_module_says_how_it_is_named(tiny: dict[str, Any]) -> None:
    tiny["loss"] = [{"use": "classics.at"}]
    assert refused(tiny).startswith("loss.0.reads.student.")


@pytest.mark.parametrize(("loss", "place"), [("kd", "teacher.main.train"), (None, "student")])
def test_a_missing_target_says_who_learns_from_it(
    loss: str | None, place: str, own: str, tiny: dict[str, Any]
) -> None:
    tiny["data"] |= {"source": f"{own}:changed", "args": {"how": "no target"}}
    if loss is None:
        del tiny["loss"], tiny["teacher"]
    said = refused(tiny)
    assert said.startswith(f"{place}: learns from labels alone")
    assert "['id', 'input']" in said


def test_nan_is_looked_for_in_the_inputs_then_in_the_models(own: str, tiny: dict[str, Any]) -> None:
    del tiny["teacher"]["main"]["train"]
    net = {"use": "module", "model": f"{own}:Poisoned"}
    assert refused({**tiny, "teacher": {"main": net}}).startswith("teacher.main: 'logits' is not finite")
    assert refused({**tiny, "student": net}).startswith("student: 'logits' is not finite")
    tiny["data"] |= {"source": f"{own}:changed", "args": {"how": "nan"}}
    assert refused({**tiny, "student": net}).startswith("data.source: 'input' is not finite")


@pytest.mark.parametrize("how", ["too large", "negative", "int32", "float32"])
def test_targets_that_are_no_classes(how: str, own: str, tiny: dict[str, Any]) -> None:
    tiny["data"] |= {"source": f"{own}:changed", "args": {"how": how}}
    said = refused(tiny)
    assert said.startswith("data.source: 'target'")
    assert "torch.int64, 0 to 9, or -100" in said


def test_a_target_that_is_wrong_later_on(own: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"] |= {"source": f"{own}:judged_late", "args": {}}
    with pytest.raises(InputError, match=r"'target'[\s\S]*0 to 9"):
        kdcore.run(tiny, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "place"),
    [
        ({"use": "language"}, "task.use: 'language' judges logits [B, L, V]"),
        ({"use": "segmentation"}, "task.use: 'segmentation' judges logits [B, C, H, W]"),
        ({"metrics": ["accuracy", "accuracy"]}, "task.metrics: named twice"),
        (
            {"use": "regression", "metrics": ["accuracy"]},
            "task.metrics: task.use = 'regression' has no such metric",
        ),
        ({"metrics": ["mean_squared_error"]}, "task.metrics: task.use = 'classification' has no such metric"),
    ],
)
def test_a_task_that_does_not_fit(task: dict[str, Any], place: str, tiny: dict[str, Any]) -> None:
    assert refused({**tiny, "task": task}).startswith(place)


@pytest.mark.parametrize(
    ("source", "how", "words"),
    [
        ("overlapping", "the same", "samples of train are in val"),
        ("overlapping", "items", "samples of train are in test"),
        ("overlapping", "shared", "samples of train are in val"),
        ("overlapping", "count from 0", ""),
        ("changed", "same id", "samples of train share an id"),
    ],
)
def test_doubtful_splits_are_a_warning(
    source: str, how: str, words: str, own: str, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["data"] |= {"source": f"{own}:{source}", "args": {"how": how}}
    kdcore.check(tiny, quiet=False)
    said = capsys.readouterr().err
    assert words in said
    assert bool(said) == bool(words)


def test_a_teacher_from_nowhere_is_a_warning_of_the_check(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del tiny["teacher"]["main"]["train"]
    kdcore.check(tiny, quiet=False)
    assert "warning: teacher.main has neither checkpoint nor train" in capsys.readouterr().err
    tiny["teacher"]["main"]["checkpoint"] = ""
    assert refused(tiny).startswith("teacher.main.checkpoint")
