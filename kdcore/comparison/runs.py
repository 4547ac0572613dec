"""What the processes of a comparison do: train the teachers, run one arm with one seed. Both resume."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcore import api
from kdcore import recipe as recipes
from kdcore.building import to_train
from kdcore.checkpoint import replacing
from kdcore.data import load
from kdcore.errors import RunError
from kdcore.folder import opened
from kdcore.report import collapsed, read_metrics
from kdcore.running import stages
from kdcore.signals import graceful
from kdcore.source import LOCK
from kdcore.stages import StageRun, train_teacher
from kdcore.tables import DataTable
from kdcore.types import Data

# of a fit that is done, as its last file says
FIT_FILES = ("metrics.jsonl", "weights.safetensors", "teacher.safetensors", "result.json")


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
        if self.home not in sys.path:
            sys.path.insert(0, self.home)
        torch.set_num_threads(self.tree["train"]["threads"])


def train_teachers(job: Job) -> None:
    """Train every teacher that the recipe trains, into ``job.folder``; done ones are left as they are."""
    job.arrive()
    job.folder.mkdir(parents=True, exist_ok=True)
    with graceful():
        run = StageRun(recipes.parse(job.tree), "teacher", job.folder)
        for name in to_train(run.recipe):
            train_teacher(run, name)


def standard_stages(tree: dict[str, Any]) -> list[str]:
    """The folders of the stages that get the trained teachers: one that trains its own, or repeats, does so itself."""
    found = stages(recipes.parse(tree))
    return [each.name for each in found if each.table.use == "distill" and "teacher" not in each.table.over]


def run_arm(job: Job) -> dict[str, Any]:
    """The run of one arm and seed, or what a finished one left: see ``outcome``."""
    job.arrive()
    source = recipes.Source(job.tree, str(Path(job.home) / "recipe.toml"))  # where its modules are found
    with opened(job.folder, source, resume=True, force=False):
        _place_teachers(job)
    api.run(job.folder / LOCK, out=job.folder, resume=True)
    return outcome(job.folder)


def outcome(folder: Path) -> dict[str, Any]:
    """A finished run in short. ``test`` holds the student's metrics and the numbers that probes measured, as
    ``probe.NAME.KEY``; ``curve`` holds [step, validation metric]."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    if "student" not in results:
        raise RunError("the run trained no student that could be judged: no stage of it is distill")
    fit, models = results["student"], results.get("test", {})
    measured = dict(_numbers(results.get("probes", {}), "probe"))
    seconds = {name: {"seconds": each["seconds"]} for name, each in results.get("teachers", {}).items()}
    files = sorted(folder.glob("stages/**/student/metrics.jsonl"))
    rows = read_metrics(files[-1]) if files else []
    judged = ((row["step"], [v for k, v in row.items() if k.startswith("val/")]) for row in rows)
    return {
        "test": {**models.get("student", {}), **measured},
        "teachers": {n: {**each, **seconds.get(n, {})} for n, each in models.items() if n != "student"},
        "curve": [[step, metrics[0]] for step, metrics in judged if metrics],
        "warnings": fit["guards"]["warnings"],
        "collapsed": collapsed(results),
        "data": results.get("data", {}),
        "setup": results.get("setup", []),
        "fingerprint": {"steps": fit["steps"], **fit["guards"]["fingerprint"]},
        **{key: fit[key] for key in ("seconds", "peak_memory")},
        **{key: results[key] for key in ("parameters", "conventions", "versions")},
    }


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """(place, number) of every number in nested tables."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(each, f"{place}.{key}")
    elif isinstance(value, int | float):
        yield place, float(value)


def without_test(*, source: str, args: dict[str, Any] = {}) -> Data:  # noqa: B006 - read only
    """The data of ``source`` with val in the place of test: all that a trial of a search may see."""
    data = load(DataTable(source=source, args=args))
    data.test = data.val
    return data


def _place_teachers(job: Job) -> None:
    """Give the run its trained teachers as fits that are done: the same bits, and nothing to train."""
    trained = sorted(job.teachers.glob("teacher-*")) if job.teachers else []
    for stage in standard_stages(job.tree):
        for source in (folder / name for folder in trained for name in FIT_FILES):
            target = job.folder / "stages" / stage / source.parent.name / source.name
            if not target.exists():
                _link(source, target)


def _link(source: Path, into: Path) -> None:
    """A hard link where the file system has them: weights are not doubled for every run."""
    with replacing(into) as draft:
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)
