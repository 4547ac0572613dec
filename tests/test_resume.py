"""A run that is killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import kdcore
from kdcore.checkpoint import newest_state
from kdcore.errors import InputError, Interrupted, RunError
from kdcore.signals import Stop


def test_a_run_killed_at_several_steps_ends_with_the_same_bits(
    rich: tuple[dict[str, Any], Any], tmp_path: Path, digest: Callable[[Path], dict[str, str]]
) -> None:
    recipe, parts = rich
    whole = kdcore.run(recipe, out=tmp_path / "whole")
    for crashes in ({1}, {3}, {4}, {5, 9}, {2, 6, 11}):
        parts.CRASH_AT.update(crashes)
        broken = tmp_path / f"broken-{len(list(tmp_path.iterdir()))}"
        for _ in range(len(crashes)):
            with pytest.raises(parts.Crash):
                kdcore.run(recipe, out=broken, resume=broken.exists())
        kdcore.run(recipe, out=broken, resume=True)
        assert digest(broken) == digest(whole.folder)
        last = [newest_state(f / "stages/distill/student/state") for f in (broken, whole.folder)]
        assert last[0] is not None
        assert last[1] is not None
        _same(last[0][1], last[1][1])


def test_accumulation_and_workers_survive_too(
    rich: tuple[dict[str, Any], Any], tmp_path: Path, digest: Callable[[Path], dict[str, str]]
) -> None:
    recipe, parts = rich
    recipe["train"]["accumulate"] = 2
    recipe["data"]["workers"] = 1
    whole = kdcore.run(recipe, out=tmp_path / "whole")
    parts.CRASH_AT.add(5)
    with pytest.raises(parts.Crash):
        kdcore.run(recipe, out=tmp_path / "broken")
    kdcore.run(recipe, out=tmp_path / "broken", resume=True)
    assert digest(tmp_path / "broken") == digest(whole.folder)


def test_a_damaged_newest_state_is_passed_over(
    rich: tuple[dict[str, Any], Any], tmp_path: Path, digest: Callable[[Path], dict[str, str]]
) -> None:
    recipe, parts = rich
    whole = kdcore.run(recipe, out=tmp_path / "whole")
    parts.CRASH_AT.add(8)
    with pytest.raises(parts.Crash):
        kdcore.run(recipe, out=tmp_path / "broken")
    states = sorted((tmp_path / "broken/stages/distill/student/state").glob("step-*.state"))
    assert len(states) == 2
    states[-1].write_bytes(states[-1].read_bytes()[: states[-1].stat().st_size // 2])
    kdcore.run(recipe, out=tmp_path / "broken", resume=True)
    assert digest(tmp_path / "broken") == digest(whole.folder)


def test_a_changed_recipe_is_refused_with_the_difference(tiny: dict[str, Any], tmp_path: Path) -> None:
    kdcore.run(tiny, out=tmp_path / "run")
    tiny["loss"][0]["temperature"] = 2.0
    with pytest.raises(InputError, match="the recipe changed since the run began") as caught:
        kdcore.run(tiny, out=tmp_path / "run", resume=True)
    assert "2.0" in str(caught.value)
    with pytest.raises(InputError, match="holds a run already"):
        kdcore.run(tiny, out=tmp_path / "run")


def test_a_signal_saves_and_leaves_with_a_code_of_its_own(
    rich: tuple[dict[str, Any], Any],
    tmp_path: Path,
    digest: Callable[[Path], dict[str, str]],
    monkeypatch: Any,
) -> None:
    recipe, parts = rich
    recipe["train"]["checkpoint_every"] = 1000
    whole = kdcore.run(recipe, out=tmp_path / "whole")

    def signalled(self: Any, batch: Any, student: Any) -> None:
        original(self, batch, student)
        if self.run.step == 5:
            Stop.note(signal.SIGTERM, None)

    original = parts.Bank.after_step
    monkeypatch.setattr(parts.Bank, "after_step", signalled)
    with pytest.raises(Interrupted, match="SIGTERM at step 5") as caught:
        kdcore.run(recipe, out=tmp_path / "broken")
    assert caught.value.exit_code == 3
    monkeypatch.setattr(parts.Bank, "after_step", original)
    kdcore.run(recipe, out=tmp_path / "broken", resume=True)
    assert digest(tmp_path / "broken") == digest(whole.folder)


def test_a_finished_run_is_not_trained_again(tiny: dict[str, Any], tmp_path: Path) -> None:
    first = kdcore.run(tiny, out=tmp_path / "run")
    before = (tmp_path / "run/stages/distill/student/weights.safetensors").stat().st_mtime_ns
    again = kdcore.run(tiny, out=tmp_path / "run", resume=True)
    assert again.metrics == first.metrics
    assert (tmp_path / "run/stages/distill/student/weights.safetensors").stat().st_mtime_ns == before


def test_nan_stops_the_run_and_names_the_term(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["train"]["optimizer"] = {"use": "SGD", "lr": 1e30}
    tiny["teacher"]["main"]["train"]["optimizer"] = {"use": "AdamW", "lr": 1e-3}
    with pytest.raises(RunError, match="not finite at step"):
        kdcore.run(tiny, out=tmp_path / "run")


def test_the_state_is_loaded_without_running_code(tmp_path: Path) -> None:
    torch.save({"x": os.system}, tmp_path / "step-000000001.state")
    said: list[str] = []
    assert newest_state(tmp_path, said.append) is None
    assert "damaged" in said[0]


def test_sigkill_of_the_process(
    tiny: dict[str, Any], tmp_path: Path, digest: Callable[[Path], dict[str, str]]
) -> None:
    """The real thing once: another process, SIGKILL at whatever moment, resumed from the command line."""
    tiny["train"] |= {"epochs": 40, "checkpoint_every": 2}
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tomli_w.dumps(tiny), "utf-8")
    whole = kdcore.run(recipe, out=tmp_path / "whole")
    command = [
        sys.executable,
        "-m",
        "kdcore",
        "run",
        str(recipe),
        "--out",
        str(tmp_path / "killed"),
        "--quiet",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    states = tmp_path / "killed/stages/distill/student/state"
    deadline = time.monotonic() + 60
    while process.poll() is None and len(list(states.glob("*.state"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kdcore.run(recipe, out=tmp_path / "killed", resume=True)
    assert digest(tmp_path / "killed") == digest(whole.folder)


def _same(left: Any, right: Any, place: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left.keys() - {"seconds"}:
            _same(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            _same(a, b, f"{place}/{index}")
    else:
        assert left == right, place


def test_same_is_able_to_fail() -> None:
    with pytest.raises(AssertionError):
        _same({"a": torch.zeros(2)}, {"a": torch.ones(2)})
