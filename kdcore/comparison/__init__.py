"""``kd compare``: matched arms of one recipe over seeds, judged by paired tests. See docs/compare.md."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from kdcore import api
from kdcore import recipe as recipes
from kdcore.checkpoint import write_json
from kdcore.comparison import tune as tuning
from kdcore.comparison.arms import STOCK, Tree, arms_of
from kdcore.comparison.matching import changes_data, measured_differences, recipe_differences
from kdcore.comparison.pool import Outcome, spread
from kdcore.comparison.runs import Job, finished, outcome, run_arm, train_teachers
from kdcore.comparison.stats import compare_all
from kdcore.comparison.verdicts import scale_of, verdict
from kdcore.errors import InputError, Interrupted, RunError
from kdcore.folder import beside
from kdcore.progress import Progress
from kdcore.recipe import Source
from kdcore.task import DEFAULT_METRICS

TUNING_SEED = 1000  # a search's seed is this far from the recipe's: no seed is both chosen on and reported


@dataclass(frozen=True)
class Comparison:
    """What came out: the folder (report.md, report.html, compare.json), one row an arm, a sentence an arm."""

    folder: Path
    table: list[dict[str, Any]]
    verdicts: dict[str, str]
    markdown: str


def compare(
    where: api.RecipeLike,
    arms: Iterable[str] = (),
    *,
    overrides: Iterable[str] = (),
    seeds: int = 5,
    jobs: int = 1,
    tune: int = 0,
    space: Iterable[str] = (),
    teacher: Literal["shared", "per-seed"] = "shared",
    references: Iterable[str] = (),
    detect: float | None = None,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
) -> Comparison:
    """Run matched arms of a recipe over ``seeds`` and judge them by the first metric of its task, on test.

    ``arms`` as in ``kdcore.comparison.arms``; ``tune`` trials of a search for each arm on val, over
    ``space`` (``KEY=[LOW, HIGH]``); ``references``: arms that every other one is compared with, too, beside
    none and kd; ``detect``: the difference worth seeing, in points; ``out`` may hold an interrupted
    comparison, or one of fewer seeds or arms: what is finished there is not run again.
    Raises InputError before anything runs; RunError after the report where a run failed.
    """
    if seeds < 2:
        raise InputError("--seeds", "a paired test needs two at least", given=seeds)
    source = recipes.read(where, overrides)
    recipe = recipes.check(source)
    (trees, own), first, task = arms_of(source, arms), recipe.seed, recipe.task
    more = [*references]
    for name in more:
        if name not in trees:
            raise InputError("--reference", "no such arm", given=name, allowed=", ".join(trees))
    metrics = DEFAULT_METRICS[task.use] if task.metrics is None else task.metrics
    if not metrics:
        raise InputError("task.metrics", "a comparison needs a metric", hint="the first one decides")
    folder = Path(out or f"runs/compare-{own}-{datetime.datetime.now():%Y%m%d-%H%M%S}").resolve()
    work = Work(
        source, trees, own, folder, range(first, first + seeds), jobs, metrics[0], teacher, Progress(quiet)
    )
    work.references = list(dict.fromkeys([*STOCK, *more]))
    work.check()
    rooms = tuning.spaces(trees, space) if tune else {}
    work.join({"tune": tune, "space": rooms, "teacher": teacher})
    threads = torch.get_num_threads()
    try:
        work.run(tune, rooms)
    except Interrupted as stop:
        raise Interrupted(f"{stop}\nthe same command with --out {folder} goes on") from None
    finally:
        torch.set_num_threads(threads)
    return work.report(detect)


@dataclass
class Work:
    """A comparison under way. ``own`` is the arm that is the recipe itself; outcomes are by arm and seed."""

    source: Source
    trees: dict[str, Tree]
    own: str
    folder: Path
    seeds: range
    jobs: int
    metric: str
    teacher: str
    progress: Progress
    references: list[str] = field(default_factory=lambda: list(STOCK))
    total: int = 0
    count: int = 0
    outcomes: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    searches: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Every arm's recipe, wholly, before the first is run."""
        with beside(self.source):
            for name, tree in self.trees.items():
                try:
                    api.check(tree)
                except InputError as error:
                    error.place = error.place if name == self.own else f"arm {name}: {error.place}"
                    raise recipes.located(error, self.source) from error.__cause__

    def join(self, settings: dict[str, Any]) -> None:
        """Open the folder, or go on in it: arms and seeds may have been added, none changed."""
        path = self.folder / "plan.json"
        plan = json.loads(json.dumps({"arms": self.trees, **settings}, default=str))
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            pairs = [(key, before[key], plan[key]) for key in settings if key != "space"]
            pairs += [
                (f"arm {n}", t, plan["arms"][n]) for n, t in before["arms"].items() if n in plan["arms"]
            ]
            if changed := [key for key, old, new in pairs if old != new]:
                problem = f"{changed[0]} was another when this comparison began"
                raise InputError(str(self.folder), problem, hint="name another --out")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(str(self.folder), "not empty, and no comparison", hint="name another --out")
        write_json(path, plan)

    def run(self, tune: int, rooms: dict[str, tuning.Space]) -> None:
        """Teachers, then the searches, then every arm with every seed; what is finished is only read."""
        teachers = {(arm, seed): self._teacher_job(arm, seed) for arm in self.trees for seed in self.seeds}
        preparations = list({job.folder: job for job in teachers.values() if job}.values())
        self.total = len(preparations) + tune * len(self.trees) + len(teachers)
        with self.progress.task(f"compare {self.own}", self.total, "trainings"):
            spread(train_teachers, preparations, self.jobs, self._prepared)
            if tune:
                studies = [
                    self._study(arm, rooms[arm], tune, teachers[arm, self.seeds[0]]) for arm in self.trees
                ]
                spread(tuning.search, studies, self.jobs, self._searched)
            todo = [self._job(arm, seed, teacher) for (arm, seed), teacher in teachers.items()]
            for job in (done := [job for job in todo if finished(job)]):
                self._ran(job, (True, outcome(job.folder)))
            spread(run_arm, [job for job in todo if job not in done], self.jobs, self._ran)

    def _job(self, arm: str, seed: int, teacher: Job | None) -> Job:
        tree, folder = {**self.trees[arm], "seed": seed}, self.folder / "runs" / arm / f"seed-{seed}"
        return Job(arm, tree, folder, str(self.source.folder), teacher.folder if teacher else None)

    def _teacher_job(self, arm: str, seed: int) -> Job | None:
        """What this run's teachers come from: one job for all runs whose recipes train the same ones."""
        tree = self.trees[arm]
        standard = [
            s for s in tree.get("stage", [{"use": "distill"}]) if s["use"] == "distill" and "teacher" not in s
        ]
        if not standard or all(t.get("train") is None for t in tree.get("teacher", {}).values()):
            return None
        first = next(n for n in (self.own, *self.trees) if self.trees[n].get("teacher") == tree["teacher"])
        job = self._job(first, seed if self.teacher == "per-seed" else self.seeds[0], None)
        folder = self.folder / "teachers" / first / job.folder.name
        return replace(job, arm=f"teachers of {first}", folder=folder)

    def _study(self, arm: str, room: tuning.Space, trials: int, teacher: Job | None) -> tuning.Study:
        job = self._job(arm, self.seeds[0] + TUNING_SEED, teacher)
        job = replace(job, tree=tuning.hide_test(job.tree), folder=self.folder / "search" / arm)
        return tuning.Study(job, room, trials, self.metric)

    def _prepared(self, job: Job, told: Outcome) -> None:
        if not told[0]:
            raise RunError(f"{job.title}: {told[1]}")
        self._tick(job.title)

    def _searched(self, study: tuning.Study, told: Outcome) -> None:
        arm = study.job.arm
        if not told[0]:
            raise RunError(f"the search of {arm}: {told[1]}")
        self.searches[arm], self.trees[arm] = told[1], tuning.changed(self.trees[arm], told[1]["values"])
        self._tick(f"search of {arm}", study.trials)

    def _ran(self, job: Job, told: Outcome) -> None:
        good, found = told
        if good and self.metric in found["test"]:
            self.outcomes.setdefault(job.arm, {})[job.tree["seed"]] = found
            value = found["test"][self.metric]
            self.progress.note({job.title: value})
            self._tick(f"{job.title}: {self.metric} {value:.4g}")
        else:
            reason = f"seed {job.tree['seed']}: {f'the run gave no {self.metric}' if good else found}"
            self.failures.setdefault(job.arm, []).append(reason)
            self._tick(f"{job.arm}, {reason}")

    def _tick(self, text: str, amount: int = 1) -> None:
        self.count += amount
        self.progress.advance(self.count)
        if not sys.stderr.isatty():
            self.progress.say(f"{self.count} of {self.total}: {text}")

    def report(self, detect: float | None) -> Comparison:
        """Judge the arms all of whose runs ended, and write it down."""
        from kdcore.comparison.page import write

        whole = [arm for arm in self.trees if arm not in self.failures]
        values = {
            arm: [self.outcomes[arm][seed]["test"][self.metric] for seed in self.seeds] for arm in whole
        }
        differences = compare_all(values, [name for name in self.references if name in values])
        scale = scale_of(self.metric, detect, max((abs(v[0]) for v in values.values()), default=1.0))
        unmatched = {arm: self.unmatched(arm) for arm in whole}
        judged = dict.fromkeys(arm for arm, _ in differences)
        verdicts = {arm: verdict(arm, differences, scale, unmatched[arm]) for arm in judged}
        verdicts |= {arm: f"failed, so not judged: {'; '.join(why)}" for arm, why in self.failures.items()}
        found = write(self, values, differences, scale, unmatched, verdicts)
        if self.failures:
            (arm, (first, *_)), count = (
                next(iter(self.failures.items())),
                sum(map(len, self.failures.values())),
            )
            raise RunError(
                f"{count} runs failed: {arm}, {first}\n  hint    {self.folder / 'report.md'} has the rest"
            )
        return found

    def unmatched(self, arm: str) -> list[str]:
        """In what an arm differs from the recipe's own, apart from the method and what was searched."""
        pair = (arm, self.own)
        searched = {k for n in pair for t in self.searches.get(n, {}).get("trials", []) for k in t["values"]}
        ours, theirs = (recipes.parse(self.trees[name]) for name in pair)
        seeds = [seed for seed in self.seeds if seed in self.outcomes.get(self.own, {})]
        mine, others = ([self.outcomes[name][seed]["fingerprint"] for seed in seeds] for name in pair)
        data = not (changes_data(ours) or changes_data(theirs))
        rows = recipe_differences(ours, theirs, leave=searched)
        return rows + measured_differences(mine, others, data=data)
