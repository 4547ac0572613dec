"""What a stage is given (``StageRun``), and the standard one (``Distill``).

A stage loops only through ``fit``, which owns precision, ranks, checkpoints and resume. What is done is
noted in the stage's folder, so a run that stopped between two fits goes on with the second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from kdcore import building, parallel
from kdcore.checkpoint import load_tensors, save_tensors, write_json, write_text
from kdcore.context import RunContext
from kdcore.data import Source
from kdcore.distill import Distiller
from kdcore.errors import InputError
from kdcore.folder import IDENTITY, same_recipe
from kdcore.kinds import Stage, Teacher
from kdcore.parts import Parts
from kdcore.preparing import prepare
from kdcore.progress import Progress
from kdcore.recipe import merge, parse, teacher_train
from kdcore.tables import Ramp, Recipe, TrainTable
from kdcore.task import Task, View, judge
from kdcore.types import CONVENTIONS


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

    def builder(self) -> building.Builder:
        return building.Builder(self.seed, self.artefacts)

    def over(self, tables: Mapping[str, Any]) -> Recipe:
        """The recipe with other tables laid over it."""
        return parse(merge(self.recipe.model_dump(exclude_unset=True), tables)) if tables else self.recipe

    def of_teacher(self, name: str) -> StageRun:
        """This stage on what the teacher is trained on: its own ``data`` laid over the recipe's, loaded and checked."""
        table = self.recipe.teacher[name]
        if not table.data:
            return self
        try:
            if table.train is None:
                raise InputError("data", "this teacher is not trained here", hint="add its train table")
            found = replace(self, recipe=self.over({"data": table.data}))
            found.source.sample()
        except InputError as error:
            raise error.under(f"teacher.{name}") from None
        return found

    def context(self, parts: Parts, train: TrainTable | None = None) -> tuple[Distiller, RunContext]:
        """A prepared distiller: built, set up, sharded, tapped, tried on a small real batch, on the device."""
        pieces = [n for n, table in self.recipe.teacher.items() if table.shard and n in parts.teachers]
        table = train or self.recipe.train
        distiller = Distiller(parts)
        if table.strategy == "fsdp" or pieces:
            from kdcore.sharding import ShardedDistiller

            distiller = ShardedDistiller(parts, table, pieces)
        distiller.accumulate = table.accumulate
        run = RunContext(distiller, self.source, seed=self.seed, folder=self.folder, artefacts=self.artefacts)
        run.device, run.recipe = self.device, self.recipe
        prepare(distiller, run)
        return distiller, run

    def fit(self, parts: Parts, name: str, train: TrainTable | None = None) -> dict[str, Any]:
        """Train ``parts`` under this stage's folder; the student's weights are then in NAME/weights.safetensors.

        Done already (a resumed run): the weights are loaded and nothing is trained. Returns the result.
        """
        from kdcore import engine

        table, folder, student = train or self.recipe.train, self.folder / name, parts.student
        done, weights = folder / "result.json", folder / "weights.safetensors"
        identity = self.identity(name, parts, train)
        if done.exists():
            same_recipe(folder, identity)
            student.load_state_dict(load_tensors(weights, name))
            student.to(self.device)
            return dict(json.loads(done.read_text("utf-8")))
        if parallel.world() > 1:
            parallel.refuse_batch_statistics(student)
        distiller, _ = self.context(parts, table)
        distiller.guards.enabled, distiller.guards.title = self.recipe.report.guards, f"{self.name}/{name}"
        distiller.guards.warnings += doubts(self, parts)
        parallel.make_folder(folder)
        for each in [student, *parts.teachers.values()] if table.compile else ():
            each.model.compile()
        job = engine.Fit(
            distiller,
            table,
            folder,
            evaluate=partial(self.evaluate, student, parts.task, "val", parts.views.get("student")),
            identity=identity,
            force=self.force,
            title=f"{self.name}/{name}",
            progress=self.progress,
        )
        result = engine.fit(job)
        result["curves"] = str((folder / "metrics.jsonl").relative_to(self.folder))
        if not parallel.rank():
            save_tensors(weights, student.state_dict())
            write_text(folder / IDENTITY, identity)
            write_json(done, result)
        parallel.barrier()
        return result

    def identity(self, name: str = "", parts: Parts | None = None, train: TrainTable | None = None) -> str:
        """A digest of what decides the bits of a fit, or of the whole stage; what another one left is refused."""
        tree = self.recipe.model_dump(exclude={"report", "export", "name", "description", "probe"})
        tree["train"] = (train or self.recipe.train).model_dump(exclude={"checkpoint_every"})
        if (
            parts is not None and parts.student.place and len(parts.components()) == 1
        ):  # nothing else reaches it
            kind, _, model = parts.student.place.partition(".")
            tree = {key: tree[key] for key in ("seed", "data", "task", "train", kind)}
            tree[kind] = {**tree[kind][model], "train": None} if model else tree[kind]
        here = next((f"{p.parent}/" for p in self.folder.parents if p.name == "stages"), None)
        text = repr((name, self.name, self.seed_offset, tree))  # the run folder may have moved
        return hashlib.sha256((text.replace(here, "") if here else text).encode()).hexdigest()

    def child(self, stage: Stage, name: str, over: Mapping[str, Any] = {}, offset: int = 0) -> dict[str, Any]:
        """Run another stage inside this one, with its own folder and step counter."""
        inner = replace(
            self,
            recipe=self.over(over),
            name=f"{self.name}/{name}",
            folder=self.folder / name,
            seed_offset=self.seed_offset + offset,
        )
        parallel.make_folder(inner.folder)
        return stage.run(inner)

    def evaluate(self, model: Any, task: Task, split: str, view: View = None) -> dict[str, float]:
        """The task's metrics of a model, behind its view, on a split."""
        return judge(model, self.source.loader(split), task, self.device, view).compute()


class Distill(Stage):
    """The standard procedure: train the teachers that ask for it, the student alone if the report wants it,
    the student with distillation; judge all on the test split, once, at the end."""

    def run(self, run: StageRun) -> dict[str, Any]:
        run = replace(run, recipe=self.view(run.recipe, run.artefacts))
        recipe, builder, view = run.recipe, run.builder(), run.recipe.student.view
        results: dict[str, Any] = {"teachers": {}}
        models: dict[str, Any] = {}
        for name in building.to_train(recipe):
            models[name], results["teachers"][name] = train_teacher(run, name)
        if recipe.report.baseline:
            student = building.make_student(recipe, run.builder())
            results["baseline"] = run.fit(building.alone(recipe, run.source, student, view), "baseline")
            models["baseline"] = student
        parts = building.assemble(recipe, run.source, builder)
        for name, teacher in parts.teachers.items():
            if name in models:
                teacher.load_state_dict(models[name].state_dict())
            elif not teacher.saved and teacher.live:
                models[name] = teacher
        results["student"] = run.fit(parts, "student")
        models["student"] = parts.student
        results["test"], majority = _judged(run, models, parts.task, {"baseline": view, **parts.views})
        results["data"] = {**run.source.facts(), "majority": majority}
        results["parameters"] = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
        results["conventions"] = conventions_of(parts)
        path = run.folder / "student.safetensors"
        if not parallel.rank():
            save_tensors(path, parts.student.parameters_to_ship(), {"format": "pt"})
        return {"student": str(path), "results": results}


def trainee(run: StageRun, name: str) -> tuple[Teacher, Parts]:
    """A teacher as it is before its training, and the parts of that."""
    teacher = building.make_teacher(run.recipe, name, run.builder())
    student = teacher.trainee()
    assert student is not None  # make_teacher saw to it
    student.place = teacher.place
    return teacher, building.alone(run.recipe, run.source, student, run.recipe.teacher[name].view)


def train_teacher(run: StageRun, name: str) -> tuple[Teacher, dict[str, Any]]:
    """A teacher trained on the labels of its own data, or loaded where that is done; and the result of its fit.

    Its weights are then in teacher-NAME/teacher.safetensors.
    """
    run = run.of_teacher(name)
    teacher, parts = trainee(run, name)
    result = run.fit(parts, f"teacher-{name}", teacher_train(run.recipe, name))
    path = run.folder / f"teacher-{name}" / "teacher.safetensors"
    if not path.exists() and not parallel.rank():
        save_tensors(path, teacher.state_dict())
    parallel.barrier()
    return teacher, result


def _judged(
    run: StageRun, models: Mapping[str, Any], task: Task, views: Mapping[str, View]
) -> tuple[dict[str, dict[str, float]], float | None]:
    """Test metrics of every model behind its view, with the student's agreement with each teacher; and what naming
    the most frequent class would come to."""
    if task.table.use == "none":
        return {}, None
    meters = {
        name: judge(model, run.source.loader("test"), task, run.device, views[name])
        for name, model in models.items()
    }
    found = {name: meter.compute() for name, meter in meters.items()}
    for name, meter in meters.items():
        if meter.classes and name not in ("student", "baseline"):
            ours, theirs = torch.cat(meters["student"].classes), torch.cat(meter.classes)
            found["student"][f"agreement_{name}"] = float((ours == theirs).double().mean())
    return found, meters["student"].majority()


def doubts(run: StageRun, parts: Parts) -> list[str]:
    """Warnings before any step: of the data, and of each teacher of which nothing says where its weights come from."""
    recipe = run.recipe
    return run.source.doubts + [
        f"teacher.{name} has neither checkpoint nor train: unless its callable loads weights, they are random."
        for name, teacher in parts.teachers.items()
        if recipe.teacher[name].train is None and not getattr(teacher, "has_weights", True)
    ]


def conventions_of(parts: Parts) -> list[dict[str, Any]]:
    """What each loss does where frameworks silently differ, for the report."""
    return [
        {
            "loss": slot.name,
            "component": f"{type(slot.loss).__name__}({slot.loss.extra_repr()})",
            "weight": slot.weight.model_dump() if isinstance(slot.weight, Ramp) else slot.weight,
            "teachers": list(slot.teachers),
            **{name: getattr(slot.loss, name) for name in CONVENTIONS},
        }
        for slot in parts.losses
    ]


def device_of(train: TrainTable) -> torch.device:
    """The device to train on; InputError where it is not here, or cannot do the precision."""
    gpu = torch.cuda.is_available() and train.device != "cpu"
    if train.device == "cuda" and not gpu:
        raise InputError("train.device", "no CUDA device is here", given="cuda", allowed="cpu, auto")
    if train.precision == "fp16" and not gpu:
        allowed = "fp32, bf16 on a CPU"
        raise InputError("train.precision", "fp16 training needs a GPU", given="fp16", allowed=allowed)
    return torch.device(f"cuda:{torch.cuda.current_device()}" if gpu else "cpu")
