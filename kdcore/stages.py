"""Stages: the procedures of a run, and what they may do (``StageRun``).

A stage loops only through ``fit``, which owns precision, ranks, checkpoints and resume. What is done is
noted in the stage's folder, so a run that stopped between two fits goes on with the second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from kdcore import building as build
from kdcore import parallel, sharding
from kdcore.checkpoint import load_tensors, save_tensors, write_json
from kdcore.context import RunContext
from kdcore.data import Source
from kdcore.distill import Distiller
from kdcore.errors import InputError
from kdcore.kinds import Stage, Teacher
from kdcore.optimizers import optimizer_of, optimizer_tables
from kdcore.parts import Parts
from kdcore.progress import Progress
from kdcore.recipe import merge, parse, teacher_train
from kdcore.streams import aligned, viewed
from kdcore.tables import Recipe, TrainTable
from kdcore.task import Task, evaluate
from kdcore.types import Batch

if TYPE_CHECKING:
    from torch import nn


@dataclass
class StageRun:
    """What a stage is given. ``recipe`` is the run's with the stage's own tables laid over it."""

    recipe: Recipe
    name: str
    folder: Path
    artefacts: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    seed_offset: int = 0
    force: bool = False

    @property
    def seed(self) -> int:
        return self.recipe.seed + self.seed_offset

    @cached_property
    def source(self) -> Source:
        return Source(self.recipe.data, self.seed)

    @cached_property
    def device(self) -> torch.device:
        return device_of(self.recipe.train)

    def builder(self) -> build.Builder:
        return build.Builder(self.seed, self.artefacts, self.folder)

    def of_teacher(self, name: str) -> StageRun:
        """This stage on what the teacher is trained on: its own ``data`` laid over the recipe's, loaded and checked."""
        over = self.recipe.teacher[name].data
        if not over:
            return self
        if self.recipe.teacher[name].train is None:
            raise InputError(
                f"teacher.{name}.data", "this teacher is not trained here", hint="add its train table"
            )
        try:
            recipe = parse(merge(self.recipe.model_dump(exclude_unset=True), {"data": over}))
            found = replace(self, recipe=recipe)
            found.source.sample()
        except InputError as error:
            error.place = f"teacher.{name}.{error.place}"
            raise
        return found

    def context(self, parts: Parts, train: TrainTable | None = None) -> tuple[Distiller, RunContext]:
        """A prepared distiller: built, set up, sharded, tapped, tried on a small real batch, on the device."""
        pieces = [n for n, table in self.recipe.teacher.items() if table.shard and n in parts.teachers]
        table = train or self.recipe.train
        sharded = sharding.chosen(parts, table, pieces)
        distiller = Distiller(parts)
        distiller.accumulate = table.accumulate
        run = RunContext(distiller, self.source, seed=self.seed, folder=self.folder, artefacts=self.artefacts)
        run.device, run.recipe = self.device, self.recipe
        build.prepare(parts, self.source, run, distiller, sharded)
        return distiller, run

    def fit(self, parts: Parts, name: str, train: TrainTable | None = None) -> dict[str, Any]:
        """Train ``parts`` under this stage's folder; the student's weights are then in NAME/weights.safetensors.

        Done already (a resumed run): the weights are loaded and nothing is trained. Returns the result.
        """
        from kdcore import engine

        table, folder = train or self.recipe.train, self.folder / name
        done = folder / "result.json"
        student, view = parts.student, parts.views.get("student", {})
        if done.exists():
            student.load_state_dict(load_tensors(folder / "weights.safetensors", name))
            student.to(self.device)
            result: dict[str, Any] = json.loads(done.read_text("utf-8"))
            return result
        if parallel.world() > 1:
            parallel.refuse_batch_statistics(student)
        distiller, _ = self.context(parts, table)
        distiller.guards.enabled = self.recipe.report.guards
        distiller.guards.warnings += _untrained(self.recipe, parts)
        parallel.make_folder(folder)
        if table.compile:
            for model in [student.model, *(t.model for t in parts.teachers.values())]:
                model.compile()
        job = engine.Fit(
            distiller,
            self.source,
            table,
            folder,
            evaluate=lambda: evaluate(
                _Viewed(student, view), self.source.loader("val"), parts.task, self.device
            ),
            make_optimizer=lambda params: optimizer_of(table.optimizer, params, "train.optimizer"),
            optimizer_tables=optimizer_tables(self.recipe, parts) if parts.losses else {},
            identity=self.identity(name),
            force=self.force,
            title=f"{self.name}/{name}",
            visualizers=tuple(self.recipe.report.visualizers),
            progress=self.progress,
        )
        result = engine.fit(job)
        sharding.restored(student)
        result["curves"] = str((folder / "metrics.jsonl").relative_to(self.folder))
        if not parallel.rank():
            save_tensors(folder / "weights.safetensors", student.state_dict())
            write_json(done, result)
        parallel.barrier()
        return result

    def identity(self, name: str) -> str:
        """A digest of everything that decides the bits of a fit; a state of another digest is refused."""
        tree = self.recipe.model_dump(exclude={"report", "export", "name", "description", "probe"})
        tree["train"].pop("checkpoint_every", None)
        here = next((f"{p.parent}/" for p in self.folder.parents if p.name == "stages"), None)
        text = repr((name, self.name, self.seed_offset, tree))  # the run folder may have moved
        return hashlib.sha256((text.replace(here, "") if here else text).encode()).hexdigest()

    def child(
        self, stage: Stage, name: str, over: Mapping[str, Any] | None = None, offset: int = 0
    ) -> dict[str, Any]:
        """Run another stage inside this one, with its own folder and step counter."""
        recipe = self.recipe if not over else parse(merge(self.recipe.model_dump(exclude_unset=True), over))
        inner = StageRun(
            recipe,
            f"{self.name}/{name}",
            self.folder / name,
            self.artefacts,
            self.progress,
            self.seed_offset + offset,
            self.force,
        )
        parallel.make_folder(inner.folder)
        return stage.run(inner)

    def evaluate(self, model: Any, task: Task, split: str) -> dict[str, float]:
        return evaluate(model, self.source.loader(split), task, self.device)


class Distill(Stage):
    """The standard procedure: train the teachers that ask for it, the student alone if the report wants it,
    the student with distillation; judge all on the test split, once, at the end."""

    def run(self, run: StageRun) -> dict[str, Any]:
        recipe = self.view(run.recipe, run.artefacts)
        run = replace(run, recipe=recipe)
        results: dict[str, Any] = {"teachers": {}}
        models: dict[str, Any] = {}
        builder = run.builder()
        weights = {n: self._teacher(run, n, results, models) for n in build.to_train(recipe)}
        if recipe.report.baseline:
            alone = build.assemble(recipe, run.source, run.builder(), with_losses=False)
            results["baseline"] = run.fit(alone, "baseline")
            models["baseline"] = alone.student
        parts = build.assemble(recipe, run.source, builder)
        for name, path in weights.items():
            parts.teachers[name].load_state_dict(load_tensors(path, f"teacher.{name}"))
        for name, teacher in parts.teachers.items():
            if name not in models and not teacher.saved and teacher.live:
                models[name] = teacher
        results["student"] = run.fit(parts, "student")
        models["student"] = parts.student
        results["test"] = self._judge(run, models, parts)
        results["parameters"] = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
        results["conventions"] = conventions_of(parts)
        path = run.folder / "student.safetensors"
        if not parallel.rank():
            save_tensors(path, parts.student.parameters_to_ship(), {"format": "pt"})
        return {"student": str(path), "results": results}

    def _teacher(self, run: StageRun, name: str, results: dict[str, Any], models: dict[str, Any]) -> Path:
        run, table = run.of_teacher(name), run.recipe.teacher[name]
        train = teacher_train(run.recipe, name)
        teacher: Teacher = run.builder().make("teacher", table.use, table.params, f"teacher.{name}")
        trainee = teacher.trainee()
        if trainee is None:
            raise InputError(
                f"teacher.{name}.train", f"a teacher of use = {table.use!r} cannot be trained here"
            )
        parts = Parts(trainee, Task(run.recipe.task, run.source.data.classes), task_streams=_streams(run))
        parts.views = {"student": table.view}
        results["teachers"][name] = run.fit(parts, f"teacher-{name}", train)
        path = run.folder / f"teacher-{name}" / "teacher.safetensors"
        if not path.exists() and not parallel.rank():
            save_tensors(path, teacher.state_dict())
        parallel.barrier()
        models[name] = teacher
        return path

    @staticmethod
    def _judge(run: StageRun, models: Mapping[str, Any], parts: Parts) -> dict[str, dict[str, float]]:
        """Test metrics of every model, with the student's agreement with each teacher."""
        task = parts.task
        if task.table.use == "none":
            return {}
        found = {}
        for name, model in models.items():
            viewed = _Viewed(model, parts.views.get(name, {}))
            found[name] = run.evaluate(viewed, task, "test")
        for name in parts.teachers:
            if name in models and task.table.use == "classification":
                found["student"][f"agreement_{name}"] = agreement(run, parts, name)
        return found


def _untrained(recipe: Recipe, parts: Parts) -> list[str]:
    """A warning for each teacher of which nothing says where its weights come from."""
    return [
        f"teacher.{name} has neither checkpoint nor train: unless its callable loads weights, they are random."
        for name, teacher in parts.teachers.items()
        if recipe.teacher[name].train is None and not getattr(teacher, "has_weights", True)
    ]


class _Viewed:
    """A model behind its view, for evaluation."""

    def __init__(self, model: Any, view: Mapping[str, str]) -> None:
        self.model, self.view = model, view

    @property
    def training(self) -> bool:
        return bool(self.model.training)

    def eval(self) -> None:
        self.model.eval()

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def __call__(self, batch: Batch) -> Any:
        mine = viewed(batch, self.view)
        return aligned(self.model(mine), mine, self.view)

    def infer(self, outputs: Any) -> dict[str, torch.Tensor]:
        return self.model.infer(outputs) if hasattr(self.model, "infer") else {"logits": outputs.logits}

    def task_loss(self, outputs: Any, batch: Batch) -> Any:
        return self.model.task_loss(outputs, batch) if hasattr(self.model, "task_loss") else None


@torch.no_grad()
def agreement(run: StageRun, parts: Parts, teacher: str) -> float:
    """The share of test samples on which student and teacher give the same class."""
    student, same, count = parts.student, 0, 0
    student.eval()
    views = parts.views
    for batch in run.source.loader("test"):
        batch = batch.to(run.device)
        mine = _Viewed(student, views.get("student", {}))
        ours = next(iter(mine.infer(mine(batch)).values())).argmax(1)
        theirs = _Viewed(parts.teachers[teacher], views.get(teacher, {}))(batch).logits.argmax(1)
        same, count = same + int((ours == theirs).sum()), count + len(ours)
    return same / max(count, 1)


class Rounds(Stage):
    """Repeat a stage ``count`` times; round r's artefacts are ``name@r``, the last round's are ``name`` too."""

    def __init__(
        self,
        *,
        count: Annotated[int, Field(gt=0)],
        body: str = "distill",
        tables: dict[str, Any] = {},  # noqa: B006
    ) -> None:
        self.count, self.body, self.tables = count, body, tables

    def run(self, run: StageRun) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(self.count):
            stage = run.builder().make("stage", self.body, {}, f"{run.name}.body")
            artefacts = run.child(stage, f"round-{index}", self.tables, offset=index)
            for key, value in artefacts.items():
                found[f"{key}@{index}"] = found[key] = value
                run.artefacts[f"{run.name}.{key}@{index}"] = run.artefacts[f"{run.name}.{key}"] = value
        return found


class Collect(Stage):
    """Run a teacher or the initial student over a split and keep what it says, row by row, as safetensors.

    ``names`` are outputs to keep (``logits`` or named tensors); the artefact ``outputs`` is the file, with
    the sample ids under ``id``.
    """

    def __init__(self, *, model: str = "main", split: str = "train", names: list[str] = ["logits"]) -> None:  # noqa: B006
        self.model, self.split, self.names = model, split, names

    @torch.no_grad()
    def run(self, run: StageRun) -> dict[str, Any]:
        path = run.folder / "outputs.safetensors"
        if path.exists():
            return {"outputs": str(path)}
        if self.split == "test":
            raise InputError("stage.split", "the test split is read once, at the end of a run", given="test")
        model = self._model(run).to(run.device).eval()
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("id", *self.names)}
        for batch in run.source.loader(self.split):
            outputs = model(batch.to(run.device))
            rows["id"].append(batch["id"].cpu())
            for name in self.names:
                rows[name].append(outputs[name].cpu())
        save_tensors(path, {name: torch.cat(values) for name, values in rows.items()})
        return {"outputs": str(path)}

    def _model(self, run: StageRun) -> nn.Module:
        if self.model == "student":
            return build.make_student(run.recipe, run.builder())
        if self.model not in run.recipe.teacher:
            raise InputError(
                "stage.model", "no such model", given=self.model, allowed=["student", *run.recipe.teacher]
            )
        table = run.recipe.teacher[self.model]
        teacher: nn.Module = run.builder().make("teacher", table.use, table.params, f"teacher.{self.model}")
        return teacher


def conventions_of(parts: Parts) -> list[dict[str, Any]]:
    """What each loss does where frameworks silently differ, for the report."""
    rows = []
    for slot in parts.losses:
        loss = slot.loss
        rows.append(
            {
                "loss": slot.name,
                "component": f"{type(loss).__name__}({loss.extra_repr()})",
                "weight": slot.weight if isinstance(slot.weight, float | int) else slot.weight.model_dump(),
                "teachers": list(slot.teachers),
                "t_squared": loss.t_squared,
                "hard_term_inside": loss.hard_term,
                "zero_at_teacher": loss.zero_at_teacher,
                "couples_batch": loss.couples_batch,
            }
        )
    return rows


def device_of(train: TrainTable) -> torch.device:
    """The device to train on; InputError where it is not here, or cannot do the precision."""
    here = torch.cuda.is_available()
    if train.device == "cuda" and not here:
        raise InputError("train.device", "no CUDA device is here", given="cuda", allowed="cpu, auto")
    if train.precision == "fp16" and (train.device == "cpu" or not here):
        allowed = "fp32, bf16 on a CPU"
        raise InputError("train.precision", "fp16 training needs a GPU", given="fp16", allowed=allowed)
    return torch.device("cpu" if train.device == "cpu" or not here else f"cuda:{torch.cuda.current_device()}")


def _streams(run: StageRun) -> tuple[str, ...] | None:
    stream = run.recipe.task.stream
    return None if stream is None else (stream,) if isinstance(stream, str) else tuple(stream)
