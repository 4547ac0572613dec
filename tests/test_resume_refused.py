"""Who may go on with a run folder, and as what: one process at a time, and never under a recipe that did not make it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdcore
from kdcore import shipping
from kdcore.checkpoint import load_state, save_state
from kdcore.distill import Distiller
from kdcore.errors import InputError, Interrupted
from kdcore.folder import locked
from kdcore.signals import Stop
from kdcore.source import LOCK

FIT = "stages/distill/student"


@pytest.fixture
def broken(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that a crash ended at the student's sixth step of eight; its last state is of the fourth."""
    tiny["train"]["checkpoint_every"] = 4
    real = Distiller.train_step

    def crashing(self: Distiller, data: Any, optim_wrapper: Any) -> Any:
        if self.parts.losses and self.run.step == 5:
            raise KeyboardInterrupt
        return real(self, data, optim_wrapper)

    monkeypatch.setattr(Distiller, "train_step", crashing)
    with pytest.raises(KeyboardInterrupt):
        kdcore.run(tiny, out=tmp_path / "run")
    monkeypatch.setattr(Distiller, "train_step", real)
    return tmp_path / "run"


def test_a_folder_in_which_a_run_is_live_is_refused(tiny: dict[str, Any], broken: Path) -> None:
    """The live run's drafts stay, too: it would miss them between writing and renaming."""
    draft = broken / FIT / ".weights.safetensors.1.tmp"
    with locked(broken):
        draft.write_text("half", "utf-8")
        for resume in (True, False):
            with pytest.raises(InputError, match=f"at work here, process {os.getpid()}") as caught:
                kdcore.run(tiny, out=broken, resume=resume)
        assert caught.value.exit_code == 2
        assert draft.exists()
    assert kdcore.run(tiny, out=broken, resume=True).metrics
    assert not draft.exists()
    assert not [path for path in broken.iterdir() if path.name.startswith(".")]


def test_a_new_folder_is_locked_while_its_run_is_live(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def meddle(*_: Any) -> dict[str, Any]:
        with pytest.raises(InputError) as caught:
            kdcore.run(tiny, out=tmp_path / "run", resume=True)
        said.append(str(caught.value))
        return {}

    monkeypatch.setattr(shipping, "measure_probes", meddle)
    tiny["probe"] = [{"use": "kd-fidelity"}]
    kdcore.run(tiny, out=tmp_path / "run")
    assert "at work here" in said[0]


def test_a_file_system_without_locks_is_used_without_one(
    tiny: dict[str, Any], broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    assert kdcore.run(tiny, out=broken, resume=True).metrics


def longer(tree: dict[str, Any]) -> None:
    tree["train"]["epochs"] = 3


def taught_longer(tree: dict[str, Any]) -> None:
    tree["teacher"]["main"]["train"]["epochs"] = 2


def shorter(tree: dict[str, Any]) -> None:
    tree["train"]["epochs"] = None
    tree["train"]["steps"] = 3


def test_a_finished_run_keeps_its_recipe(tiny: dict[str, Any], tmp_path: Path) -> None:
    folder = kdcore.run(tiny, out=tmp_path / "run").folder
    lock = (folder / LOCK).read_bytes()
    longer(tiny)
    with pytest.raises(InputError, match=r"train\.epochs: 2 -> 3[\s\S]*undo it, or another --out"):
        kdcore.run(tiny, out=folder, resume=True, force=True)
    assert (folder / LOCK).read_bytes() == lock


@pytest.mark.parametrize("change", [taught_longer, shorter])
def test_what_is_finished_is_not_kept_under_another_recipe(
    change: Callable[[dict[str, Any]], None], tiny: dict[str, Any], broken: Path
) -> None:
    lock = (broken / LOCK).read_bytes()
    change(tiny)
    with pytest.raises(
        InputError, match=r"finished, and by another recipe|at step 4, and the recipe ends at 3"
    ):
        kdcore.run(tiny, out=broken, resume=True, force=True)
    assert (broken / LOCK).read_bytes() == lock


def test_what_a_change_does_not_reach_is_kept(tiny: dict[str, Any], broken: Path) -> None:
    """The teacher has a length of its own, and no part in the student's losses."""
    teacher = broken / "stages/distill/teacher-main/weights.safetensors"
    before = teacher.stat().st_mtime_ns
    longer(tiny)
    tiny["loss"][0]["temperature"] = 2.0
    result = kdcore.run(tiny, out=broken, resume=True, force=True)
    assert result.results["student"]["steps"] == 12
    assert teacher.stat().st_mtime_ns == before


def test_a_finished_stage_is_not_kept_under_another_recipe(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["stage"] = [{"use": "distill", "name": "first"}, {"use": "distill", "name": "second"}]
    folder = kdcore.run(tiny, out=tmp_path / "run").folder
    (folder / "results.json").unlink()
    tiny["stage"][1]["train"] = {"epochs": 3}
    with pytest.raises(InputError, match="stages/second: is finished"):
        kdcore.run(tiny, out=folder, resume=True, force=True)
    longer(tiny)
    with pytest.raises(InputError, match="stages/first: is finished"):
        kdcore.run(tiny, out=folder, resume=True, force=True)


def test_the_seconds_of_all_legs_are_counted(tiny: dict[str, Any], broken: Path) -> None:
    path = broken / FIT / "state/step-000000004.state"
    state = load_state(path)
    assert state["seconds"] > 0
    save_state(path, {**state, "seconds": 1000.0})
    kdcore.run(tiny, out=broken, resume=True)
    assert json.loads((broken / FIT / "result.json").read_text("utf-8"))["seconds"] > 1000


def test_a_resume_of_nothing_says_so(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kdcore.run(tiny, out=tmp_path / "run", resume=True, quiet=False)
    assert f"nothing to resume in {tmp_path / 'run'}: starting" in capsys.readouterr().err


def test_who_is_stopped_is_told_how_to_go_on(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Distiller.train_step

    def signalled(self: Distiller, data: Any, optim_wrapper: Any) -> Any:
        Stop.note(signal.SIGTERM, None)
        return real(self, data, optim_wrapper)

    monkeypatch.setattr(Distiller, "train_step", signalled)
    with pytest.raises(Interrupted, match=f"SIGTERM at step 1[\\s\\S]*kd resume {tmp_path / 'run'}"):
        kdcore.run(tiny, out=tmp_path / "run")
