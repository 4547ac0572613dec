"""tools/kill_harness.py sees what differs between two runs, and sees nothing after kills."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kdcore.checkpoint import load_state, save_state

TOOL = Path(__file__).resolve().parent.parent / "tools" / "kill_harness.py"


@pytest.fixture(scope="module")
def harness() -> Any:
    spec = importlib.util.spec_from_file_location("kill_harness", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_harness"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_equal_runs_are_equal_and_each_change_is_named(
    harness: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["train"]["checkpoint_every"] = 3
    one, two = (kdcore.run(tiny, out=tmp_path / name).folder for name in ("one", "two"))
    whole = harness.everything(one)
    assert harness.difference(whole, harness.everything(two)) == []
    fit = "stages/distill/student"
    state = load_state(two / fit / "state/step-000000006.state")
    moments = state["optimizer"]["state"][0]["exp_avg"]
    moments[0] += torch.finfo(moments.dtype).eps
    save_state(two / fit / "state/step-000000006.state", state)
    with (two / fit / "metrics.jsonl").open("a") as lines:
        lines.write("{}\n")
    results = json.loads((two / "results.json").read_text("utf-8"))
    results["test"]["student"]["accuracy"] += 1e-9
    results["student"]["seconds"] += 1.0
    (two / "results.json").write_text(json.dumps(results), "utf-8")
    (two / ".weights.safetensors.7.tmp").write_text("half", "utf-8")
    (two / "report.md").unlink()
    named = [".weights.safetensors.7.tmp", "report.md", "results.json"]
    named += [f"{fit}/metrics.jsonl", f"{fit}/state/step-000000006.state"]
    assert harness.difference(whole, harness.everything(two)) == sorted(named)


@pytest.mark.slow
def test_a_run_killed_at_random_moments(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "plain", "--kills", "4", "--seed", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("plain: 4 kills")
    assert ", 0 differences" in done.stdout
