"""Comparisons whose truth is known, with real runs; what is finished, interrupted, broken; the report."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import kdcore
from kdcore.checkpoint import load_tensors
from kdcore.comparison import Comparison
from kdcore.comparison.stats import paired
from kdcore.errors import InputError, RunError
from kdcore.plugins import Entry
from kdcore.shipping import load_student
from kdcore.source import LOCK

SMUGGLER = """
    from kdcore import Component, hookimpl

    @hookimpl
    def kd_losses():
        yield Component("loud", "{module}:Loud")
        yield Component("loud.nan", "{module}:nan")
"""
SMUGGLED = """
    import torch
    from kdcore.kinds import Loss
    from kdcore.losses import kd_loss

    class Loud(Loss):
        '''Plain distillation that brightens the images behind everybody's back.'''
        def forward(self, student, teacher, batch):
            return kd_loss(student.logits, teacher.logits)

        def before_step(self, batch):
            batch["input"] += 0.01

    def nan(student_logits, teacher_logits):
        return (student_logits - teacher_logits).sum(-1) * float("nan")
"""


@pytest.fixture
def loud(install: Callable[..., Entry], write_module: Callable[..., str]) -> None:
    install("loud", SMUGGLER.format(module=write_module(SMUGGLED)))


def values(found: Comparison, arm: str) -> list[float]:
    return list(next(row["values"] for row in found.table if row["arm"] == arm))


def row(found: Comparison, arm: str) -> dict[str, Any]:
    return next(row for row in found.table if row["arm"] == arm)


def test_arms_whose_truth_is_known(tiny: dict[str, Any], tmp_path: Path, loud: None) -> None:
    """Twins do not differ; what is not the method's is found, in the recipe or only in the batches."""
    specs = ["twin:loss.0.weight=0.9", "small:data.batch_size=16", "loud"]
    specs += ["other:teacher.main.args.hidden=[4]"]
    found = kdcore.compare(tiny, arms=specs, seeds=2, out=tmp_path / "c")
    assert [row["arm"] for row in found.table] == [
        "none",
        "kd",
        "tiny",
        "twin",
        "small",
        "loud",
        "other",
    ]
    assert values(found, "twin") == values(found, "tiny")
    assert {row["arm"]: row["unmatched"] for row in found.table if not row["matched"]} == {
        "small": [
            "data.batch_size: 32 -> 16",
            "which samples came first",
            "the first augmented batch",
            "the number of steps",
        ],
        "loud": ["the first augmented batch"],
        "other": ["teacher.main.args.hidden.0: 16 -> 4", "the teachers' weights"],
    }
    assert "NOT MATCHED" not in found.verdicts["twin"]
    assert all("NOT MATCHED" in found.verdicts[arm] for arm in ("small", "loud", "other"))
    first, second = (tmp_path / "c/runs" / arm / "seed-0/student.safetensors" for arm in ("tiny", "twin"))
    assert first.read_bytes() == second.read_bytes()
    _one_teacher_for_all(tmp_path / "c", found)


def _one_teacher_for_all(folder: Path, found: Comparison) -> None:
    weights = {
        path.read_bytes()
        for arm in ("none", "kd", "loud")
        for path in folder.glob(f"runs/{arm}/seed-*/**/teacher.safetensors")
    }
    assert len(weights) == 1
    assert {path.parent.parent.parent.name for path in folder.glob("teachers/**/teacher.safetensors")} == {
        "tiny",
        "other",
    }
    runs = json.loads((folder / "compare.json").read_text("utf-8"))["runs"]
    prints = [run["fingerprint"] for run in runs["kd"].values()]
    assert prints[0]["teachers"] == prints[1]["teachers"]
    assert prints[0]["student"] != prints[1]["student"]
    assert prints[0]["ids"] != prints[1]["ids"]


def test_an_arm_that_is_better_by_construction(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["student"]["args"]["hidden"] = [1]
    tiny["train"] = {"epochs": 10, "optimizer": {"use": "AdamW", "lr": 1e-2}}
    found = kdcore.compare(tiny, arms=["wide:student.args.hidden=[64]"], seeds=3, out=tmp_path / "c")
    wide, kd, none = (values(found, arm) for arm in ("wide", "kd", "none"))
    assert min(wide) > max(kd + none)
    assert re.match(
        r"better than kd by \d\d\.?\d* points \[.*\], p .*; better than none by", found.verdicts["wide"]
    )
    assert "NOT MATCHED" in found.verdicts["wide"]
    assert row(found, "wide")["unmatched"] == [
        "student.args.hidden.0: 1 -> 64",
        "the student's initial weights",
    ]
    assert "no difference to kd shown at 3 seeds" in found.verdicts["tiny"]
    assert row(found, "wide")["vs kd"]["p"] == pytest.approx(paired(wide, kd).p)
    assert row(found, "wide")["parameters"] > row(found, "kd")["parameters"]


def test_what_is_finished_is_not_run_again(tiny: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "c"
    before = kdcore.compare(tiny, seeds=2, out=out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/results.json")}
    assert len(times) == 6
    (out / "runs/kd/seed-1/results.json").unlink()  # as a run that was killed before its end
    after = kdcore.compare(tiny, seeds=3, out=out)
    for path, time in times.items():
        assert (path.stat().st_mtime_ns == time) == ("kd/seed-1" not in str(path))
    assert len(list(out.glob("runs/**/results.json"))) == 9
    assert [values(after, arm)[:2] for arm in ("none", "kd", "tiny")] == [
        values(before, a) for a in ("none", "kd", "tiny")
    ]
    with pytest.raises(
        InputError, match=r"changed since this comparison began: arms\.kd\.train\.epochs: 2 -> 1"
    ):
        kdcore.compare(tiny, overrides=["train.epochs=1"], seeds=2, out=out)
    with pytest.raises(InputError, match="no comparison"):
        kdcore.compare(tiny, seeds=2, out=out / "runs")


def test_a_run_that_fails_costs_only_its_arm(tiny: dict[str, Any], tmp_path: Path, loud: None) -> None:
    with pytest.raises(RunError, match="2 runs failed"):
        kdcore.compare(tiny, arms=["loud.nan"], seeds=2, out=tmp_path / "c")
    record = json.loads((tmp_path / "c/compare.json").read_text("utf-8"))
    assert [row["arm"] for row in record["table"]] == ["none", "kd", "tiny"]
    assert "failed, so not judged: seed 0: loss term 'loud-nan' is nan" in record["verdicts"]["loud.nan"]


PROBED = """
    import math
    from kdcore import Probe

    class Size(Probe):
        def measure(self, run, models, data):
            total = sum(float(p.detach().abs().sum()) for p in models["student"].parameters())
            return {"total": total, "by": {"nothing": math.nan}, "name": "size"}
"""


def test_what_probes_measure_is_a_metric_of_every_arm(
    tiny: dict[str, Any], tmp_path: Path, install: Callable[..., Entry], write_module: Callable[..., str]
) -> None:
    declared = 'from kdcore import Component, hookimpl\n@hookimpl\ndef kd_probes():\n    yield Component("size", "{}:Size")'
    install("size", declared.format(write_module(PROBED)))
    tiny["probe"] = [{"use": "size"}]
    found = kdcore.compare(tiny, seeds=2, metric="probe.size.total", out=tmp_path / "c")
    assert "judged by probe.size.total" in found.markdown
    for arm in ("none", "kd", "tiny"):
        runs = [
            json.loads(p.read_text("utf-8"))
            for p in sorted((tmp_path / "c/runs" / arm).glob("*/results.json"))
        ]
        assert values(found, arm) == [run["probes"]["size"]["total"] for run in runs]
    beside = kdcore.compare(tiny, seeds=2, out=tmp_path / "c").markdown
    mean, sd = (f(values(found, "kd")) for f in (statistics.fmean, statistics.stdev))
    assert f"| {mean:.4g} ± {sd:.2g} |" in next(
        r for r in beside.splitlines() if r.startswith("| probe.size.total")
    )
    with pytest.raises(
        RunError, match=r"6 runs failed: none, seed 0: the run gave no finite probe\.size\.by\.nothing"
    ):
        kdcore.compare(tiny, seeds=2, metric="probe.size.by.nothing", out=tmp_path / "c")
    with pytest.raises(InputError, match="no such metric"):
        kdcore.compare(tiny, seeds=2, metric="probe.sise.total", out=tmp_path / "c")


def test_input_errors_come_before_anything_runs(tiny: dict[str, Any], tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"arms": ["hot:loss.0.temperatur=2"]}, "arm hot: loss.0.temperatur: unknown parameter"),
        ({"seeds": 1}, "two at least"),
        ({"overrides": ["task.metrics=[]"]}, "a comparison needs a metric"),
        *(({"detect": value}, "a number above 0") for value in (0.0, -1.0, math.nan, math.inf)),
        ({"tune": 2, "space": ["train.optimizer.lr=[2, 1]"]}, "no range"),
    ]
    for options, message in cases:
        with pytest.raises(InputError) as caught:
            kdcore.compare(tiny, out=tmp_path / "c", **options)
        assert message in str(caught.value)
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no comparison"):
        kdcore.compare(tiny, out=tmp_path / "file")


def test_an_arm_is_a_run_folder_that_finds_the_modules_beside_the_recipe(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder = tmp_path / "home", tmp_path / "c/runs/recipe/seed-0"
    home.mkdir()
    (home / "beside_compare.py").write_text("from kdcore.zoo import mlp as net\n", "utf-8")
    (home / "recipe.toml").write_text(tomli_w.dumps({**tiny, "name": "recipe"}), "utf-8")
    override = "student.model=beside_compare:net"
    monkeypatch.setattr(sys, "path", [*sys.path])
    kdcore.compare(home / "recipe.toml", overrides=[override], seeds=2, out=tmp_path / "c")
    for _ in range(2):  # as it was left, and as a resume leaves it
        monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(home)])
        monkeypatch.delitem(sys.modules, "beside_compare")
        load_student(folder)
        kdcore.run(folder / LOCK, out=folder, resume=True)


def test_a_recipe_without_a_name_can_be_resumed(tiny: dict[str, Any], tmp_path: Path) -> None:
    del tiny["name"]
    before = kdcore.run(tiny, out=tmp_path / "r").results
    assert kdcore.run(tmp_path / "r" / LOCK, out=tmp_path / "r", resume=True).results == before


INTERRUPTING = """
    import os, signal, time
    from pathlib import Path
    from kdcore.signals import Stop
    from kdcore.zoo import mlp

    class Net(type(mlp())):
        '''Asks the comparison that it belongs to to stop, once, in the third training step.'''
        steps = 0

        def forward(self, images):
            flag = Path(os.environ.get("KD_TEST_FLAG", "none"))
            Net.steps += self.training
            if Net.steps == 3 and self.training and "KD_TEST_FLAG" in os.environ and not flag.exists():
                flag.touch()
                os.kill(os.getppid(), signal.SIGTERM)
                while not Stop.requested():
                    time.sleep(0.01)
            return super().forward(images)

    def net():
        return Net(64, (8,), 10)
"""


def test_stopped_in_two_processes_and_taken_up_again(
    tiny: dict[str, Any],
    tmp_path: Path,
    write_module: Callable[..., str],
    digest: Callable[[Path], dict[str, str]],
) -> None:
    """SIGTERM reaches the runs; what ends in other processes, in pieces, has the bits of what ran through in one."""
    tiny["student"] = {"use": "module", "model": f"{write_module(INTERRUPTING)}:net"}
    del tiny["teacher"], tiny["loss"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(tiny), "utf-8")
    code = f"import kdcore; kdcore.compare({str(recipe)!r}, seeds=2, jobs=2, out={str(tmp_path / 'a')!r})"
    env = {**os.environ, "KD_TEST_FLAG": str(tmp_path / "flag"), "OMP_NUM_THREADS": "1"}
    stopped = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert "Interrupted: stopped by SIGTERM" in stopped.stderr
    assert (tmp_path / "flag").exists()
    assert list((tmp_path / "a").glob("runs/**/step-*.state"))
    assert not (tmp_path / "a/report.md").exists()
    pieces = kdcore.compare(recipe, seeds=2, out=tmp_path / "a")
    through = kdcore.compare(recipe, seeds=2, out=tmp_path / "b")
    assert [r["values"] for r in pieces.table] == [r["values"] for r in through.table]
    runs = [dict(digest(tmp_path / side / "runs").items()) for side in "ab"]
    assert runs[0] == runs[1]
    assert all(r["matched"] for r in pieces.table)


class _Links(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for key, value in attrs if key in ("src", "href")]


def test_command_and_report(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kdcore import cli

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        tomli_w.dumps({**copy.deepcopy(tiny), "task": {"metrics": ["accuracy", "calibration_error"]}}),
        "utf-8",
    )
    arguments = [
        "compare",
        str(recipe),
        "--seeds",
        "2",
        "--teacher",
        "per-seed",
        "--out",
        str(tmp_path / "c"),
    ]
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--arm", "hot:loss.0.temperature=8", "--detect", "2", "--quiet"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    markdown = (tmp_path / "c/report.md").read_text("utf-8")
    assert markdown in told
    for heading in (
        "Verdict",
        "Results",
        "Setup of tiny",
        "Setup of the others, where it differs",
        "Matched arms",
        "Teachers",
        "Other metrics",
        "Loss conventions",
        "Made with",
    ):
        assert f"## {heading}" in markdown
    assert "to see 2.00 points" in markdown
    for fact in (
        "| samples | scikit-learn digits, 100 training images | train 100; val 270; test 629 |",
        "| hot | loss.0 | kd | weight 0.9; temperature 8 |",
        "One of the 629 test samples is 0.16 points",
        "Agreement: the share of test samples",
    ):
        assert fact in markdown
    assert "peak MB" not in markdown  # the process's: it would grow from arm to arm
    page = _Links()
    page.feed((tmp_path / "c/report.html").read_text("utf-8"))
    assert len(page.found) == 1
    assert page.found[0].startswith("data:image/png;base64,")
    assert (tmp_path / "c/comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    teachers = [
        load_tensors(p, "teacher") for p in sorted((tmp_path / "c/teachers").glob("**/teacher.safetensors"))
    ]
    assert len(teachers) == 2
    assert not all(bool((teachers[0][k] == teachers[1][k]).all()) for k in teachers[0])
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--arm", "nonsuch"])
    assert left.value.code == 2
    assert "unknown loss 'nonsuch'" in capsys.readouterr().err
