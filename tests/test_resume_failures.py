"""Kills between files, edited recipes, moved folders, full disks: the run goes on, or says in words why not."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kdcore import shipping
from kdcore.checkpoint import load_tensors
from kdcore.distill import Distiller
from kdcore.errors import InputError, RunError
from kdcore.report import read_metrics


def killed_at(step: int, recipe: dict[str, Any], parts: Any, out: Path) -> None:
    parts.CRASH_AT.add(step)
    with pytest.raises(parts.Crash):
        kdcore.run(recipe, out=out)


def test_a_recipe_edited_after_the_kill_is_refused_or_forced(
    rich: tuple[dict[str, Any], Any], tmp_path: Path
) -> None:
    recipe, parts = rich
    killed_at(5, recipe, parts, tmp_path / "run")
    lock = (tmp_path / "run/recipe.lock.toml").read_bytes()
    recipe["loss"][0]["temperature"] = 2.0
    with pytest.raises(InputError, match=r"loss.*4\.0|temperature.*2\.0") as caught:
        kdcore.run(recipe, out=tmp_path / "run", resume=True)
    assert "--force" in str(caught.value)
    assert (tmp_path / "run/recipe.lock.toml").read_bytes() == lock
    said = kdcore.run(recipe, out=tmp_path / "run", resume=True, force=True)
    rows = read_metrics(said.folder / "stages/distill/student/metrics.jsonl")
    assert [row["step"] for row in rows if "lr" in row] == [1, 10, 12]  # it went on from the state, once
    assert "temperature = 2.0" in (tmp_path / "run/recipe.lock.toml").read_text()


def test_a_state_that_cannot_fit_is_refused_in_words(
    rich: tuple[dict[str, Any], Any], tmp_path: Path
) -> None:
    recipe, parts = rich
    killed_at(5, recipe, parts, tmp_path / "run")
    recipe["student"]["args"] = {"width": 9}
    with pytest.raises(InputError, match="does not fit the recipe"):
        kdcore.run(recipe, out=tmp_path / "run", resume=True, force=True)


def test_a_state_of_another_recipe_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Copied from one run folder into another by hand: the folder's own lock cannot tell."""
    for name, seed in (("a", 1), ("b", 2)):
        kdcore.run(tiny, overrides=["train.checkpoint_every=3"], seed=seed, out=tmp_path / name)
    fits = [tmp_path / name / "stages/distill/student" for name in ("a", "b")]
    for path in [fits[1].parent / "artefacts.json", fits[1] / "result.json", tmp_path / "b/results.json"]:
        path.unlink()
    for state in (fits[0] / "state").iterdir():
        shutil.copy(state, fits[1] / "state" / state.name)
    with pytest.raises(InputError, match="belongs to another recipe"):
        kdcore.run(tiny, overrides=["train.checkpoint_every=3"], seed=2, out=tmp_path / "b", resume=True)


@pytest.mark.parametrize("left", [".recipe.lock.toml.1234.tmp", "recipe.lock.toml"])
def test_a_kill_while_the_lock_is_written(left: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    """A half-written draft is no run folder's content; a lock alone is a run that has not begun."""
    whole = kdcore.run(tiny, out=tmp_path / "whole")
    (tmp_path / "run").mkdir()
    if left.startswith("."):
        (tmp_path / "run" / left).write_text("name = ", "utf-8")
    else:
        shutil.copy(whole.folder / left, tmp_path / "run")
    run = kdcore.run(tiny, out=tmp_path / "run", resume=True)
    assert run.metrics == whole.metrics
    assert not list(run.folder.rglob(".*"))


def test_a_kill_before_the_report_is_written(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcore import report

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(report, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            kdcore.run(tiny, out=tmp_path / "run")
    run = kdcore.run(tiny, out=tmp_path / "run", resume=True)
    assert (run.folder / "report.md").exists()
    assert run.metrics


STAGED = [
    {"name": "first", "use": "distill"},
    {
        "name": "second",
        "use": "distill",
        "teacher": {"main": {"use": "module", "checkpoint": "@first.student", "args": {"hidden": [8]}}},
        "train": {"epochs": 3},
    },
]


def staged(tiny: dict[str, Any]) -> dict[str, Any]:
    """Two stages: the first one's student is the second one's teacher."""
    del tiny["teacher"]["main"]["train"]
    tiny["teacher"]["main"]["args"] = {"hidden": [16]}
    second = STAGED[1] | {"teacher": {"main": {**tiny["teacher"]["main"], **STAGED[1]["teacher"]["main"]}}}
    tiny["stage"] = [STAGED[0], second]
    tiny["train"]["checkpoint_every"] = 2
    return tiny


def test_a_moved_run_folder_goes_on_and_rebuilds_its_teachers(
    tiny: dict[str, Any], tmp_path: Path, digest: Callable[[Path], dict[str, str]], monkeypatch: Any
) -> None:
    recipe = staged(tiny)
    whole = kdcore.run(recipe, out=tmp_path / "whole").folder
    real = Distiller.train_step

    def crashing(self: Distiller, data: Any, optim_wrapper: Any) -> Any:
        if self.run.folder.name == "second" and self.run.step == 5:
            raise KeyboardInterrupt
        return real(self, data, optim_wrapper)

    monkeypatch.setattr(Distiller, "train_step", crashing)
    with pytest.raises(KeyboardInterrupt):
        kdcore.run(recipe, out=tmp_path / "here/run")
    monkeypatch.setattr(Distiller, "train_step", real)
    shutil.move(tmp_path / "here", tmp_path / "there")
    said = tmp_path / "there/run"
    assert str(tmp_path) not in (said / "stages/first/artefacts.json").read_text("utf-8")
    kdcore.run(recipe, out=said, resume=True)
    assert digest(said) == digest(whole)
    shutil.move(said, tmp_path / "last")
    teacher = shipping.load_teachers(shipping.load_run(tmp_path / "last")[1])["main"]
    first = load_tensors(tmp_path / "last/stages/first/student.safetensors", "test")
    assert all(torch.equal(value, first[name]) for name, value in teacher.model.state_dict().items())


def full_at(path: Path) -> None:
    """What is written to this path meets a full disk, in every process."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


def test_a_full_disk_under_the_metrics_ends_the_run_in_words(
    rich: tuple[dict[str, Any], Any], tmp_path: Path, digest: Callable[[Path], dict[str, str]]
) -> None:
    recipe, parts = rich
    whole = kdcore.run(recipe, out=tmp_path / "whole").folder
    killed_at(5, recipe, parts, tmp_path / "run")
    metrics = tmp_path / "run/stages/distill/student/metrics.jsonl"
    kept = metrics.read_bytes()
    full_at(metrics)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written") as caught:
        kdcore.run(recipe, out=tmp_path / "run", resume=True)
    assert caught.value.exit_code == 1
    metrics.unlink()
    metrics.write_bytes(kept)
    kdcore.run(recipe, out=tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(whole)


def test_a_full_disk_under_a_state_keeps_the_last_good_one(
    rich: tuple[dict[str, Any], Any], tmp_path: Path, digest: Callable[[Path], dict[str, str]]
) -> None:
    recipe, parts = rich
    whole = kdcore.run(recipe, out=tmp_path / "whole").folder
    killed_at(5, recipe, parts, tmp_path / "run")
    states = tmp_path / "run/stages/distill/student/state"
    before = {path.name: path.read_bytes() for path in states.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (5000, limits[1])
    )  # less than a state, more than the other files
    try:
        with pytest.raises(RunError, match=r"step-000000006\.state: cannot be written"):
            kdcore.run(recipe, out=tmp_path / "run", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in states.iterdir()} == before
    kdcore.run(recipe, out=tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(whole)


@contextmanager
def unprivileged(*folders: Path) -> Iterator[None]:
    """Without the right to write into these folders, also where the tests run as root."""
    for folder in folders:
        folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for folder in folders:
            folder.chmod(0o755)


def test_a_folder_without_the_right_to_write(rich: tuple[dict[str, Any], Any]) -> None:
    """A new run is refused before anything is trained, and so is going on with an old one."""
    recipe, parts = rich
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder cannot be entered by others
        begun, empty = Path(name, "run"), Path(name, "empty")
        killed_at(5, recipe, parts, begun)
        empty.mkdir()
        with unprivileged(Path(name), begun, empty):
            for out, resume in ((empty / "run", False), (begun, True)):
                with pytest.raises(InputError, match="cannot be written: ") as caught:
                    kdcore.run(recipe, out=out, resume=resume)
                assert caught.value.exit_code == 2
        assert not list(empty.iterdir())
