"""``kd compare``: matched arms of one recipe over seeds, judged by paired tests. See docs/compare.md."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kdcore import api
from kdcore import recipe as recipes
from kdcore.building import to_train
from kdcore.checkpoint import write_json
from kdcore.comparison import tune as tuning
from kdcore.comparison.arms import STOCK, Tree, arms_of
from kdcore.comparison.matching import changes_data, measured_differences, recipe_differences
from kdcore.comparison.pool import spread
from kdcore.comparison.runs import Job, run_arm, standard_stages, train_teachers
from kdcore.comparison.stats import Differences, compare_all
from kdcore.comparison.verdicts import scale_of, verdict
from kdcore.errors import InputError, Interrupted, RunError
from kdcore.folder import beside, difference
from kdcore.progress import Progress
from kdcore.recipe import Source
from kdcore.tables import Recipe
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
    metric: str | None = None,
    detect: float | None = None,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
) -> Comparison:
    """Run matched arms of a recipe over ``seeds`` and judge them by ``metric`` (its task's first), on test.

    ``arms`` as in ``kdcore.comparison.arms``; ``tune`` trials of a search for each arm on val, over
    ``space`` (``KEY=[LOW, HIGH]``); ``references``: arms that every other one is compared with, too, beside
    none and kd; ``metric``: one of the task's, or ``probe.NAME.KEY``, a number that a probe of the recipe measures;
    ``detect``: the difference worth seeing, in points; ``out`` may hold an interrupted comparison, or one of fewer
    seeds or arms: what is finished there is not run again.
    Raises InputError before anything runs; RunError after the report where a run failed.
    """
    if seeds < 2:
        raise InputError("--seeds", "a paired test needs two at least", given=seeds)
    if detect is not None and not 0 < detect < math.inf:
        raise InputError("--detect", "no difference to see", given=detect, allowed="a number above 0")
    source = recipes.read(where, overrides)
    recipe = recipes.check(source)
    trees, own = arms_of(source, arms)
    names = [*dict.fromkeys([*STOCK, *references])]
    for name in names:
        if name not in (*STOCK, *trees):
            raise InputError("--reference", "no such arm", given=name, allowed=trees)
    folder = Path(out or f"runs/compare-{own}-{datetime.datetime.now():%Y%m%d-%H%M%S}").resolve()
    numbers, judged = range(recipe.seed, recipe.seed + seeds), _metric(recipe, metric)
    work = Work(source, trees, own, folder, numbers, jobs, judged, teacher, names, Progress(quiet))
    work.check()
    rooms = tuning.spaces(trees, space) if tune else {}
    work.join({"arms": trees, "tune": tune, "space": rooms, "teacher": teacher})
    threads = torch.get_num_threads()
    try:
        work.run(tune, rooms)
    except Interrupted as stop:
        said = str(stop).partition("\n")[0]  # how to go on with one run of it is no way to go on here
        raise Interrupted(f"{said}\nthe same command with --out {folder} goes on") from None
    finally:
        torch.set_num_threads(threads)
    return work.report(detect)


def _metric(recipe: Recipe, wanted: str | None) -> str:
    """What decides: a metric of the task, its first if none is wanted, or what a probe of the recipe measures."""
    task = recipe.task
    metrics = DEFAULT_METRICS[task.use] if task.metrics is None else task.metrics
    probes = [f"probe.{table.use}.KEY" for table in recipe.probe]
    if not (wanted or metrics):
        raise InputError("task.metrics", "a comparison needs a metric", hint="the first one decides")
    if wanted and not (wanted in metrics or any(wanted.startswith(each[:-3]) for each in probes)):
        raise InputError("--metric", "no such metric", given=wanted, allowed=[*metrics, *probes])
    return wanted or metrics[0]


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
    references: list[str]
    progress: Progress
    total: int = 0
    count: int = 0
    outcomes: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    searches: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Every arm's recipe, wholly, before the first is run."""
        with beside(self.source):
            for name, tree in self.trees.items():
                with recipes.located(self.source):
                    try:
                        api.check(tree)
                    except InputError as error:
                        error.place = error.place if name == self.own else f"arm {name}: {error.place}"
                        raise

    def join(self, settings: Mapping[str, Any]) -> None:
        """Open the folder, or go on in it: arms and seeds may have been added, none changed."""
        path = self.folder / "plan.json"
        plan = json.loads(json.dumps(settings, default=str))
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            both = [arm for arm in before["arms"] if arm in plan["arms"]]
            old, new = (
                {**each, **{key: {arm: each[key].get(arm) for arm in both} for key in ("arms", "space")}}
                for each in (before, plan)
            )
            if changed := difference(old, new):
                problem = f"changed since this comparison began: {changed}"
                raise InputError(str(self.folder), problem, hint="name another --out")
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(str(self.folder), "not empty, and no comparison", hint="name another --out")
        write_json(path, plan)

    def run(self, tune: int, rooms: dict[str, tuning.Space]) -> None:
        """Teachers, then the searches, then every arm with every seed; what is finished is only read."""
        self.outcomes = {arm: {} for arm in self.trees}
        teachers = {(arm, seed): self._teacher_job(arm, seed) for arm in self.trees for seed in self.seeds}
        preparations = list({job.folder: job for job in teachers.values() if job}.values())
        self.total = len(preparations) + tune * len(self.trees) + len(teachers)
        with self.progress.task(f"compare {self.own}", self.total, "trainings"):
            spread(train_teachers, preparations, self.jobs, self._prepared)
            if tune:
                searches = [self._search_job(arm, teachers[arm, self.seeds[0]]) for arm in self.trees]
                search = partial(tuning.search, spaces=rooms, trials=tune, metric=self.metric)
                spread(search, searches, self.jobs, self._prepared)
            jobs = [self._job(arm, seed, teacher) for (arm, seed), teacher in teachers.items()]
            done = [job for job in jobs if (job.folder / "results.json").exists()]
            spread(run_arm, done, 1, self._ran)
            spread(run_arm, [job for job in jobs if job not in done], self.jobs, self._ran)

    def _job(self, arm: str, seed: int, teacher: Job | None) -> Job:
        tree, folder = {**self.trees[arm], "seed": seed}, self.folder / "runs" / arm / f"seed-{seed}"
        return Job(arm, tree, folder, str(self.source.folder), teacher.folder if teacher else None)

    def _teacher_job(self, arm: str, seed: int) -> Job | None:
        """What this run's teachers come from: one job for all runs whose recipes train the same ones."""
        tree = self.trees[arm]
        if not (to_train(recipes.parse(tree)) and standard_stages(tree)):
            return None
        first = next(n for n in (self.own, *self.trees) if self.trees[n].get("teacher") == tree["teacher"])
        job = self._job(first, seed if self.teacher == "per-seed" else self.seeds[0], None)
        folder = self.folder / "teachers" / first / job.folder.name
        return replace(job, arm=f"teachers of {first}", folder=folder)

    def _search_job(self, arm: str, teacher: Job | None) -> Job:
        job = self._job(arm, self.seeds[0] + TUNING_SEED, teacher)
        return replace(job, tree=tuning.hide_test(job.tree), folder=self.folder / "search" / arm)

    def _prepared(self, job: Job, found: Any) -> None:
        """Teachers (None), or what a search found: without them there is nothing to compare."""
        if isinstance(found, RunError):
            raise RunError(f"{job.title}: {found}")
        if found:
            self.searches[job.arm] = found
            self.trees[job.arm] = tuning.changed(self.trees[job.arm], found["values"])
        self._tick(job.title, len(found["trials"]) if found else 1)

    def _ran(self, job: Job, found: Any) -> None:
        if not isinstance(found, RunError) and not math.isfinite(found["test"].get(self.metric, math.nan)):
            found = RunError(f"the run gave no finite {self.metric}")
        if isinstance(found, RunError):
            self.failures.setdefault(job.arm, []).append(f"seed {job.tree['seed']}: {found}")
            self._tick(f"{job.title}: {found}")
        else:
            value = found["test"][self.metric]
            self.outcomes[job.arm][job.tree["seed"]] = found
            self.progress.note({job.title: value})
            self._tick(f"{job.title}: {self.metric} {value:.4g}")

    def _tick(self, text: str, amount: int = 1) -> None:
        self.count += amount
        self.progress.advance(self.count)
        if not sys.stderr.isatty():
            self.progress.say(f"{self.count} of {self.total}: {text}")

    def report(self, detect: float | None) -> Comparison:
        """Judge the arms all of whose runs ended, and write it down."""
        from kdcore.comparison.page import write

        whole = [arm for arm in self.trees if arm not in self.failures]
        values = {a: [self.outcomes[a][seed]["test"][self.metric] for seed in self.seeds] for a in whole}
        references = [arm for arm in self.references if arm in values]
        differences, scale = (
            compare_all(values, references),
            scale_of(self.metric, detect, values, self.step()),
        )
        table = [self._row(arm, values[arm], differences) for arm in whole]
        unmatched = {row["arm"]: row["unmatched"] for row in table}
        verdicts = {arm: verdict(arm, differences, scale, unmatched[arm]) for arm, _ in differences}
        verdicts |= {arm: f"failed, so not judged: {'; '.join(why)}" for arm, why in self.failures.items()}
        markdown = write(self, table, verdicts, differences, scale)
        said = {"metric": self.metric, "seeds": [*self.seeds], "references": references, "verdicts": verdicts}
        kept = {"searches": self.searches, "recipes": self.trees, "runs": self.outcomes}
        write_json(self.folder / "compare.json", {**said, "table": table, "failures": self.failures, **kept})
        if self.failures:
            (arm, (first, *_)), where = next(iter(self.failures.items())), self.folder / "report.md"
            count = sum(map(len, self.failures.values()))
            raise RunError(f"{count} runs failed: {arm}, {first}\n  hint    {where} has the rest")
        return Comparison(self.folder, table, verdicts, markdown)

    def facts(self) -> dict[str, Any]:
        """What a run said of the data; of the recipe's own arm, where it has runs."""
        runs = [
            *self.outcomes[self.own].values(),
            *(r for each in self.outcomes.values() for r in each.values()),
        ]
        return next((run["data"] for run in runs), {})

    def step(self) -> float:
        """What one sample of the test split makes in the metric; 0 where no sample makes a step of its own."""
        facts = self.facts()
        return 1 / facts["samples"]["test"] if self.metric == "accuracy" and facts.get("majority") else 0.0

    def _row(self, arm: str, values: list[float], differences: Differences) -> dict[str, Any]:
        """What is said of an arm, as it is kept in compare.json."""
        runs, unmatched = [*self.outcomes[arm].values()], self._unmatched(arm)
        return {
            "arm": arm,
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)),
            "values": values,
            **{f"vs {theirs}": d.told() for (ours, theirs), d in differences.items() if ours == arm},
            "seconds": float(np.mean([run["seconds"] for run in runs])),
            "parameters": runs[0]["parameters"].get("student"),
            "matched": not unmatched,
            "unmatched": unmatched,
        }

    def _unmatched(self, arm: str) -> list[str]:
        """In what an arm differs from the recipe's own, apart from the method and what was searched."""
        pair = (arm, self.own)
        searched = {k for n in pair for t in self.searches.get(n, {}).get("trials", []) for k in t["values"]}
        ours, theirs = (self.trees[name] for name in pair)
        mine, others = (self.outcomes[name] for name in pair)
        prints = [(mine[seed]["fingerprint"], others[seed]["fingerprint"]) for seed in mine if seed in others]
        data = not (changes_data(ours) or changes_data(theirs))
        return recipe_differences(ours, theirs, searched) + measured_differences(prints, data=data)
