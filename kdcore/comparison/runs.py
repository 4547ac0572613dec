"""What the processes of a comparison do: train the teachers, run one arm with one seed. Both resume."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from kdcore import api
from kdcore import recipe as recipes
from kdcore.building import to_train
from kdcore.checkpoint import replacing
from kdcore.data import _load
from kdcore.errors import RunError
from kdcore.folder import tomlable
from kdcore.report import read_metrics
from kdcore.signals import graceful
from kdcore.stages import Distill, StageRun
from kdcore.tables import DataTable, StageTable
from kdcore.types import Data

STANDARD = StageTable(use="distill", name="distill")
FIT_FILES = (
    "metrics.jsonl",
    "weights.safetensors",
    "teacher.safetensors",
    "result.json",
)  # the mark of done last


@dataclass(frozen=True)
class Job:
    """One training: an arm with a seed, in a run folder of its own.

    ``home`` is the recipe's folder, whose modules it may name; ``teachers`` holds trained ones, if any.
    """

    arm: str
    tree: dict[str, Any]
    folder: Path
    home: str
    teachers: Path | None = None

    @property
    def title(self) -> str:
        return f"{self.arm}, seed {self.tree['seed']}"

    def arrive(self) -> None:
        """What every process does first: the recipe's modules can be imported, the threads are as agreed."""
        sys.path[:] = sys.path if self.home in sys.path else [self.home, *sys.path]
        torch.set_num_threads(self.tree["train"]["threads"])


def train_teachers(job: Job) -> dict[str, Any]:
    """Train every teacher that the recipe trains, into ``job.folder``; done ones are left as they are."""
    job.arrive()
    job.folder.mkdir(parents=True, exist_ok=True)
    with graceful():
        return _Teachers().run(StageRun(recipes.parse(job.tree), "teacher", job.folder))


def run_arm(job: Job) -> dict[str, Any]:
    """The run of one arm and seed, or what a finished one left: see ``outcome``."""
    if not finished(job):
        job.arrive()
        lock = job.folder / "recipe.lock.toml"
        if not lock.exists():  # as ``kd run`` opens a folder, so that teachers can lie in it
            with replacing(lock) as draft:
                draft.write_text(tomli_w.dumps(tomlable(job.tree)), "utf-8")
        if job.teachers is not None:
            _place_teachers(job, job.teachers)
        api.run(job.tree, out=job.folder, resume=True)
    return outcome(job.folder)


def finished(job: Job) -> bool:
    """Whether the folder holds this very run, whole."""
    lock = job.folder / "recipe.lock.toml"
    if not (lock.exists() and (job.folder / "results.json").exists()):
        return False
    return bool(tomllib.loads(lock.read_text("utf-8")) == tomlable(job.tree))


def outcome(folder: Path) -> dict[str, Any]:
    """A finished run in short; ``curve`` holds [step, validation metric]."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    if "student" not in results:
        raise RunError("the run trained no student that could be judged: no stage of it is distill")
    fit, test = results["student"], results.get("test", {})
    guards = fit["guards"]
    files = sorted(folder.glob("stages/**/student/metrics.jsonl"))
    curve = [
        [row["step"], next(v for k, v in row.items() if k.startswith("val/"))]
        for row in (read_metrics(files[-1]) if files else [])
        if any(k.startswith("val/") for k in row)
    ]
    return {
        "test": test.get("student", {}),
        "curve": curve,
        "seconds": fit["seconds"],
        "peak_memory": fit["peak_memory"],
        "parameters": results["parameters"],
        "conventions": results["conventions"],
        "warnings": guards["warnings"],
        "fingerprint": {"steps": fit["steps"], **guards["fingerprint"]},
        "teachers": {n: {**v, "seconds": _seconds(results, n)} for n, v in test.items() if n != "student"},
        "versions": results["versions"],
    }


def without_test(*, source: str, args: dict[str, Any] = {}) -> Data:  # noqa: B006 - read only
    """The data of ``source`` with val in the place of test: all that a trial of a search may see."""
    data = _load(DataTable(source=source, args=args))
    data.test = data.val
    return data


class _Teachers(Distill):
    """The standard stage, as far as its teachers."""

    def run(self, run: StageRun) -> dict[str, Any]:
        results: dict[str, Any] = {"teachers": {}}
        for name in to_train(run.recipe):
            self._teacher(run, name, results, {})
        return results


def _place_teachers(job: Job, trained: Path) -> None:
    """Give the run the trained teachers as fits that are done: the same bits, and nothing to train.

    Standard stages only: one that trains a teacher of its own, or repeats, does so in every run.
    """
    for index, stage in enumerate(recipes.parse(job.tree).stage or [STANDARD]):
        if stage.use != "distill" or "teacher" in stage.params:
            continue
        into = job.folder / "stages" / recipes.stage_name(stage, index)
        for folder in sorted(trained.glob("teacher-*")):
            for name in FIT_FILES:
                if not (into / folder.name / name).exists():
                    _link(folder / name, into / folder.name / name)


def _link(source: Path, into: Path) -> None:
    """A hard link where the file system has them: weights are not doubled for every run."""
    with replacing(into) as draft:
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def _seconds(results: dict[str, Any], teacher: str) -> Any:
    return results.get("teachers", {}).get(teacher, {}).get("seconds", "")
