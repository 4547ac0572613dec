"""The stage before training: score untrained students by one batch, and leave the best one's arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from kd_plugin_diswot.looks import Distances, Look, distances, gaussian_, look
from kd_plugin_diswot.metrics import Variant
from kd_plugin_diswot.space import Arch, Cost, Score, costs, every, evolve, fitness, name_of
from kdcore import Batch, InputError, Stage
from kdcore.checkpoint import write_json
from kdcore.data import Key, batch_of
from kdcore.stages import StageRun

Count = Annotated[int, Field(gt=0)]
Choices = Annotated[list[Any], Field(min_length=1)]


@dataclass
class Candidate:
    """An architecture that was tried. ``refused`` says why it has no distances: over the budget, or it failed."""

    arch: Arch
    costs: dict[Cost, int] = field(default_factory=dict)
    relation: float = math.nan
    semantic: float = math.nan
    refused: str | None = None


class Search(Stage):
    """Chooses among students by how like the teacher they look, both untrained, on one batch a draw.

    ``space``: choices for arguments of ``student.args``; the others stay as the recipe has them. Without
    ``iterations`` every combination is tried, with it that many steps of evolution from ``student.args``
    (an argument that is not given there begins with its first choice). ``at_most`` and ``at_least`` bound
    costs. Distances are means over ``draws`` of batch and initial weights. ``score = "semantic"`` and "sum"
    of the released variant need last layers of equal shape; a candidate that cannot be scored is passed over.
    Artefacts: ``args``, for ``student.args = "@NAME.args"`` of a later stage; ``history``, a file with
    every candidate. Nothing is trained, and the validation and test splits are not read.
    """

    def __init__(
        self,
        *,
        space: dict[str, Choices],
        like: str | None = None,
        student_feature: str = "body",
        teacher_feature: str = "body",
        student_head: str = "head",
        teacher_head: str = "head",
        variant: Variant = "released",
        score: Score = "sum",
        init: Literal["gaussian", "default"] = "gaussian",
        draws: Count = 4,
        batch_size: Annotated[int, Field(gt=1)] = 64,
        at_most: dict[Cost, int] = {},  # noqa: B006 - read only; the schema shows the default
        at_least: dict[Cost, int] = {},  # noqa: B006
        iterations: Count | None = None,
        population: Count = 512,
    ) -> None:
        if not any(len(choices) > 1 for choices in space.values()):
            raise InputError("stage.space", "there is nothing to choose from", given=space)
        self.space, self.like, self.variant, self.score, self.init = space, like, variant, score, init
        self.paths = {
            "student": {"feature": student_feature, "head": student_head},
            "teacher": {"feature": teacher_feature, "head": teacher_head},
        }
        self.draws, self.batch_size = draws, batch_size
        self.at_most, self.at_least = at_most, at_least
        self.iterations, self.population = iterations, population

    def run(self, run: StageRun) -> dict[str, Any]:
        with torch.random.fork_rng():
            history = self.candidates(run)
        scored = [each for each in history if each.refused is None]
        if not scored:
            problem = "no architecture of the space could be scored"
            raise InputError("stage.space", problem, given=history[0].refused)
        values = self.fitness(scored)
        best = scored[values.index(max(values))]
        ranked = dict(zip([name_of(each.arch) for each in scored], values, strict=True))
        rows = [{**_plain(each), "score": ranked.get(name_of(each.arch))} for each in history]
        write_json(run.folder / "history.json", rows)
        found = {**_plain(best), "candidates": len(history), "refused": len(history) - len(scored)}
        args = {**run.recipe.student.params.get("args", {}), **best.arch}
        return {"args": args, "history": str(run.folder / "history.json"), "results": {"search": found}}

    def candidates(self, run: StageRun) -> list[Candidate]:
        """Every architecture that was tried, in its order: a function of the run's seed, data and space."""
        bench = Bench(self, run)
        if self.iterations is None:
            return [bench.tried(arch) for arch in every(self.space)]
        history: dict[str, Candidate] = {}

        def offer(arch: Arch) -> bool:
            history[name_of(arch)] = tried = bench.tried(arch)
            return tried.refused is None

        def worst(pool: list[Arch]) -> int:
            values = self.fitness([history[name_of(arch)] for arch in pool])
            return values.index(min(values))

        given = run.recipe.student.params.get("args", {})
        start = {name: given.get(name, choices[0]) for name, choices in self.space.items()}
        rng = np.random.default_rng([run.seed, 1])
        how = {"iterations": self.iterations, "population": self.population}
        evolve(self.space, start, offer, worst, rng=rng, **how)
        return list(history.values())

    def fitness(self, scored: list[Candidate]) -> list[float]:
        return fitness([each.relation for each in scored], [each.semantic for each in scored], self.score)


class Bench:
    """A batch and a teacher's look a draw, which every candidate is held against."""

    def __init__(self, search: Search, run: StageRun) -> None:
        self.search, self.run = search, run
        self.teacher = _teacher_of(run, search.like)
        self.batches = [self._batch(draw) for draw in range(search.draws)]
        table = run.recipe.teacher[self.teacher]
        params = {key: value for key, value in table.params.items() if key != "checkpoint"}
        self.looks = [self._look("teacher", table.use, params, draw) for draw in range(search.draws)]

    def tried(self, arch: Arch) -> Candidate:
        """The candidate with its costs and mean distances, or why it has none."""
        candidate = Candidate(arch)
        table = self.run.recipe.student
        params = {**table.params, "args": {**table.params.get("args", {}), **arch}}
        params.pop("checkpoint", None)
        try:
            model = self._made("student", table.use, params, 0)
            candidate.costs = costs(model, _view(self.batches[0].rows(torch.tensor([0])), table.view))
            candidate.refused = self._over(candidate.costs)
            if candidate.refused is None:
                found = [self._distances(table.use, params, draw) for draw in range(self.search.draws)]
                candidate.relation, candidate.semantic = (fmean(each) for each in zip(*found, strict=True))
                if not all(map(math.isfinite, self.search.fitness([candidate]))):
                    candidate.refused = "its distances are not finite"
        except (
            InputError,
            RuntimeError,
            ValueError,
        ) as error:  # shapes that do not fit, as the authors' -9999
            candidate.refused = str(error)
        return candidate

    def _over(self, found: Mapping[Cost, int]) -> str | None:
        for name, value in found.items():
            low, high = self.search.at_least.get(name, 0), self.search.at_most.get(name, math.inf)
            if not low <= value <= high:
                return f"{name} = {value} is not in the budget"
        return None

    def _distances(self, use: str, params: Mapping[str, Any], draw: int) -> Distances:
        mine, search = self._look("student", use, params, draw), self.search
        return distances(mine, self.looks[draw], search.variant, semantic=search.score != "relation")

    def _look(self, side: str, use: str, params: Mapping[str, Any], draw: int) -> Look:
        model = self._made(side, use, params, draw)
        recipe, batch = self.run.recipe, self.batches[draw]
        view = recipe.student.view if side == "student" else recipe.teacher[self.teacher].view
        seen = _view(batch, view)
        return look(lambda: model(seen).logits, model.model, batch["target"], **self.search.paths[side])

    def _made(self, side: str, use: str, params: Mapping[str, Any], draw: int) -> Any:
        """The model with this draw's initial weights, the same for every candidate's layer of equal place."""
        builder = replace(self.run, seed_offset=self.run.seed_offset + draw).builder()
        place = "student" if side == "student" else f"teacher.{self.teacher}"
        model = builder.make(side, use, params, place)
        return (gaussian_(model) if self.search.init == "gaussian" else model).to(self.run.device)

    def _batch(self, draw: int) -> Batch:
        source, rng = self.run.source, np.random.default_rng([self.run.seed, 0, draw])
        data = source.streams[source.epoch]
        rows = rng.choice(len(data), min(self.search.batch_size, len(data)), replace=False)
        batch = batch_of(data, [Key(source.epoch, 0, int(row)) for row in rows]).to(self.run.device)
        if "target" not in batch or batch["target"].dim() != 1:
            raise InputError("data.source", "the search needs classes: a target of one number a sample")
        return batch


def _view(batch: Batch, view: Mapping[str, str]) -> Batch:
    mine = batch.copy()
    mine.update({key: batch[source] for key, source in view.items()})
    return mine


def _teacher_of(run: StageRun, name: str | None) -> str:
    names = list(run.recipe.teacher)
    if (name is None and len(names) != 1) or (name is not None and name not in names):
        raise InputError("stage.like", "which teacher to look like", given=name, allowed=names)
    return name or names[0]


def _plain(candidate: Candidate) -> dict[str, Any]:
    """As JSON has it: no NaN."""
    row = asdict(candidate)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
