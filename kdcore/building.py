"""From a checked recipe to the parts of a run: phase two (signatures) and phase three (models, taps, shapes)."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcore import kinds, parallel, sharding
from kdcore.context import RunContext
from kdcore.data import Source, key_seed
from kdcore.distill import Distiller
from kdcore.errors import InputError, KDError, cause, nearest
from kdcore.kinds import Augmentation, FunctionLoss, Kind, Loss, Student, Teacher, frozen
from kdcore.parts import Parts, Slot
from kdcore.recipe import is_artefact, schema
from kdcore.tables import LossTable, Recipe
from kdcore.taps import Taps
from kdcore.task import Task, check_alignment
from kdcore.types import Batch, Outputs

__all__ = ["NATIVE", "Builder", "assemble", "make_student", "prepare", "schema", "to_train", "trainable"]
NATIVE = ("logits", "mask", "target", "unembed", "topk")


class Builder:
    """Makes components of a recipe, with references resolved. One a stage."""

    def __init__(
        self, seed: int, artefacts: Mapping[str, Any] | None = None, folder: Path | None = None
    ) -> None:
        self.seed, self.artefacts, self.folder = seed, artefacts or {}, folder
        self.built: dict[str, Any] = {}

    def make(self, kind: str, use: str, params: Mapping[str, Any], place: str) -> Any:
        """An instance of a component; its initial weights depend on the seed and its place alone."""
        target, found = schema(kind, use, f"{place}.use")
        given = {key: self._artefact(value, f"{place}.{key}") for key, value in params.items()}
        values = found.fill(given, place, self._nested)
        if kind == "loss" and not inspect.isclass(target):
            instance: Any = FunctionLoss(target, found.tensors, values)
        else:
            torch.manual_seed(key_seed(self.seed, "weights", place))
            try:
                instance = target(**values)
            except InputError as error:  # a constructor says "teacher.checkpoint": it knows its kind alone
                error.place = re.sub(rf"^{kind}(?=\.|$)", place, error.place or kind)
                raise
            except KDError:
                raise
            except Exception as error:  # a plugin's constructor may raise anything
                raise InputError(place, f"{found.name} refused its parameters: {cause(error)}") from error
        wanted = getattr(kinds, kind.capitalize())
        if kind != "exporter" and not isinstance(instance, wanted):
            problem = f"{found.name} makes a {type(instance).__name__}, which is no {wanted.__name__}"
            raise InputError(f"{place}.use", problem, hint=f"its class derives from kdcore.{wanted.__name__}")
        self.built[place.rpartition(".")[2]] = instance
        return instance

    def _nested(self, kind: str, value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            return self.make(kind, value["use"], {k: v for k, v in value.items() if k != "use"}, place)
        if isinstance(value, str) and value.startswith("@"):
            if value[1:] not in self.built:
                raise InputError(
                    place, "nothing of this name is built here", given=value, allowed=sorted(self.built)
                )
            return _Reference(self.built[value[1:]])
        return value

    def _artefact(self, value: Any, place: str) -> Any:
        """``"@stage.artefact"`` is what an earlier stage left."""
        if not is_artefact(value):
            return value
        if value[1:] not in self.artefacts:
            raise InputError(
                place, "no such artefact", given=value, allowed=sorted(self.artefacts) or "none yet"
            )
        return self.artefacts[value[1:]]


class _Reference:
    """An instance that is used but not owned: calling it calls the instance, and it is no child module."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instance(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instance, name)


def assemble(recipe: Recipe, source: Source, builder: Builder, *, with_losses: bool = True) -> Parts:
    """Every part of a run, built; taps are set by ``prepare``, after ``setup``."""
    student = make_student(recipe, builder)
    parts = Parts(
        student,
        Task(recipe.task, source.data.classes),
        task_weight=recipe.task.weight if with_losses else 1.0,  # alone, the task's term is all there is
        task_streams=_tuple(recipe.task.stream),
        forward=recipe.data.forward,
        hold_eval=_matching_modules(student, recipe.student.hold_eval),
        views={"student": recipe.student.view},
    )
    if not with_losses:
        return parts
    for name, table in recipe.teacher.items():
        parts.teachers[name] = frozen(builder.make("teacher", table.use, table.params, f"teacher.{name}"))  # type: ignore[assignment]
        parts.views[name] = table.view
    if recipe.router:
        router = recipe.router
        parts.router = builder.make("router", router.use, router.params, "router")
        parts.routed = tuple(router.teachers or recipe.teacher)
    for index, wanted in enumerate(recipe.augmentation):
        name = _unique(wanted.name or wanted.use, parts.augmentations)
        place = f"augmentation.{index}"
        parts.augmentations[name] = builder.make("augmentation", wanted.use, wanted.params, place)
    for index, each in enumerate(recipe.loss):
        parts.losses.append(_slot(recipe, each, f"loss.{index}", parts, builder))
    merging = [name for name, component in parts.components() if hasattr(component, "merge")]
    if merging and recipe.train.precision == "fp16":
        problem = f"fp16 scales the loss, and {merging[0]} merges gradients that are not scaled"
        raise InputError("train.precision", problem, given="fp16", allowed="fp32, bf16")
    return parts


def _slot(recipe: Recipe, table: LossTable, place: str, parts: Parts, builder: Builder) -> Slot:
    """A loss with its weight, teachers and streams, where they fit together."""
    loss: Loss = builder.make("loss", table.use, table.params, place)
    reads_teacher = loss.joint or any(name.startswith("teacher.") for name in loss.wants())
    teachers = (_tuple(table.teacher) or tuple(parts.teachers)) if reads_teacher else ()
    if reads_teacher and not teachers:
        problem = f"{table.use!r} reads a teacher, and the recipe has none"
        raise InputError(place, problem, hint="add [teacher.main]")
    if loss.couples_batch and recipe.train.accumulate > 1:
        problem = f"{table.use!r} relates the samples of a batch: over micro-batches it would be another loss"
        given, hint = (
            f"train.accumulate = {recipe.train.accumulate}",
            "take accumulate out, or lower batch_size",
        )
        raise InputError(place, problem, given=given, hint=hint)
    name = _unique(table.name or table.use, {slot.name for slot in parts.losses})
    return Slot(name, loss, table.weight, teachers, _tuple(table.stream), table.reads)


def to_train(recipe: Recipe) -> list[str]:
    """The teachers that are trained before the student: a cached one keeps its ``train`` table and is not."""
    asked = [(name, table) for name, table in recipe.teacher.items() if table.train is not None]
    return [name for name, table in asked if getattr(schema("teacher", table.use)[0], "live", True)]


def make_student(recipe: Recipe, builder: Builder) -> Student:
    student: Student = builder.make("student", recipe.student.use, recipe.student.params, "student")
    if recipe.student.train is not None:
        chosen = [n for n, _ in student.named_parameters() if _matches(n, recipe.student.train)]
        if not chosen:
            raise InputError("student.train", "no parameter matches", given=recipe.student.train)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in chosen)
    return student


def prepare(
    parts: Parts, source: Source, run: RunContext, distiller: Distiller, sharded: Iterable[str] = ()
) -> None:
    """Attach the run, call setup, shard, set taps, and try everything on one small real batch.

    The models' setup comes first and the taps after it, so that a loss can see in its own what it will read.
    """
    distiller.attach(run)
    _set_draws(parts, run)
    run.reseed("setup")
    models = [(name, each) for name, each in parts.components() if name.startswith(("student", "teacher."))]
    _set_up(models)
    for teacher in parts.teachers.values():
        frozen(teacher)
    for name in sharded if parallel.world() > 1 else ():
        sharding.shard(parts.student if name == "student" else parts.teachers[name], run.device)
    distiller.to(run.device)
    _set_taps(parts)
    _set_up(each for each in parts.components() if each not in models)
    distiller.to(run.device)
    _dry_run(distiller, run)


def _set_draws(parts: Parts, run: RunContext) -> None:
    """The augmentation that says which samples come next, if there is one."""
    drawing = {n: a for n, a in parts.augmentations.items() if type(a).draw is not Augmentation.draw}
    if len(drawing) > 1:
        raise InputError("augmentation", "two of them draw the samples", given=list(drawing))
    for each in drawing.values():
        run.order.follow(each.draw, each.draw_every)


def _set_up(components: Iterable[tuple[str, Kind]]) -> None:
    for name, component in components:
        if (setup := getattr(component, "setup", None)) is not None:
            try:
                setup()
            except KDError:
                raise
            except Exception as error:
                hint = "kd run --debug shows where"
                raise InputError(name, f"its setup fails: {cause(error)}", hint=hint) from error


def _set_taps(parts: Parts) -> None:
    """One Taps a model, holding the paths that any loss or the router reads there."""
    paths: dict[str, dict[str, str]] = {}
    for index, slot in enumerate(parts.losses):
        wants = slot.loss.wants()
        for side, mapping in slot.reads.items():
            if side not in ("student", "teacher"):
                raise InputError(f"loss.{index}.reads.{side}", "no such side", allowed="student, teacher")
            names = [w.partition(".")[2] for w in wants if w.startswith(f"{side}.")]
            for name, path in mapping.items():
                if name not in names:
                    raise InputError(
                        f"loss.{index}.reads.{side}.{name}", "the loss does not read this", allowed=names
                    )
                for model in ("student",) if side == "student" else slot.teachers:
                    paths.setdefault(model, {})[path] = f"loss.{index}.reads.{side}.{name}"
        for teacher in slot.teachers:
            mapping = slot.reads.get("teacher", {})
            names = [w.partition(".")[2] for w in wants if w.startswith("teacher.")]
            parts.needs.setdefault(teacher, set()).update(mapping.get(name, name) for name in names)
    for teacher in parts.routed if parts.router is not None else ():
        parts.needs.setdefault(teacher, set()).add("logits")
    for model, places in paths.items():
        owner: Student | Teacher = parts.student if model == "student" else parts.teachers[model]
        for path, place in places.items():
            _check_path(owner.model, path, place)
        parts.taps[model] = Taps(owner.model, {path: path for path in places})


def _check_path(root: nn.Module, path: str, place: str) -> None:
    modules = [name for name, _ in root.named_modules() if name]
    if path not in modules and path.removesuffix(".in") not in modules:
        hint = nearest(path, modules)
        raise InputError(place, "no module at this path of the model", given=path, allowed=modules, hint=hint)


@torch.no_grad()
def _dry_run(distiller: Distiller, run: RunContext) -> None:
    """Shapes agree, every name that is read is given, and every term can be computed."""
    parts, batch = distiller.parts, run.sample
    was_training = distiller.training
    distiller.eval()
    run.reseed("dry run")
    try:
        for stream in batch.streams:
            part = batch.part(stream)
            said = _asked(distiller, "student", part, "student")
            if not batch.parts:  # what a stream of several is for, its losses know
                _check_judged(parts, said, part)
            for name in parts.needs:
                _aligned(said, _asked(distiller, name, part, f"teacher.{name}"), parts, name)
        for augmentation in parts.augmentations.values():
            batch = augmentation(batch)
        distiller.terms(batch)
    except InputError:
        raise
    except Exception as error:  # losses, routers and augmentations may raise anything
        reason = str(error) if isinstance(error, KDError) else cause(error)
        problem, hint = f"the recipe fails on its first batch: {reason}", "kd run --debug shows where"
        raise InputError("", problem, hint=hint) from error
    finally:
        distiller.train(was_training)


def _aligned(student: Outputs, teacher: Outputs, parts: Parts, name: str) -> None:
    reading = [
        s
        for s in parts.losses
        if name in s.teachers and {"student.logits", "teacher.logits"} <= set(s.loss.wants())
    ]
    if any(not getattr(s.loss, "any_classes", False) for s in reading):
        check_alignment(student, teacher, f"teacher.{name}")


def _check_judged(parts: Parts, said: Outputs, batch: Batch) -> None:
    """The task's metrics take the student's answers: as many classes as the data have."""
    task, logits = parts.task, said.logits
    classes = task.classes if task.table.use == "classification" else None
    if classes and logits is not None and logits.shape[1] < classes:
        problem = f"the student has {logits.shape[1]} classes, the data {classes}"
        raise InputError("student", problem, hint="give the model an output for each class")
    inferred: Any = parts.student.infer(said)
    if not isinstance(inferred, Mapping):
        given, allowed = type(inferred).__name__, 'a dict of tensors, for example {"logits": ...}'
        raise InputError("student", "infer() gives tensors by name", given=given, allowed=allowed)
    try:
        task.meter().update(inferred, said, batch)
    except InputError:
        raise
    except Exception as error:
        shapes = {name: tuple(value.shape) for name, value in inferred.items()}
        problem = f"the task's metrics cannot judge what it infers: {cause(error)}"
        raise InputError("student", problem, given=shapes, allowed=f"{task.classes} classes") from error


def _asked(distiller: Distiller, name: str, part: Batch, place: str) -> Outputs:
    """A model's answer; every module that is tapped must have been called."""
    try:
        said = distiller.ask(name, part)
    except InputError:
        raise
    except Exception as error:  # a model may raise anything on data that it was not made for
        shapes = {k: tuple(v.shape) for k, v in part.items() if isinstance(v, torch.Tensor)}
        raise InputError(
            place, f"the model fails on the first batch: {cause(error)}", given=shapes
        ) from error
    taps = distiller.parts.taps.get(name)
    for path in taps.names if taps is not None else ():
        if path not in said:
            raise InputError(place, f"its forward never calls the module {path!r}, which a loss reads")
    return said


def trainable(distiller: Distiller) -> list[nn.Parameter]:
    """What the run's optimiser trains: student and components, without those that step themselves."""
    own = {id(p) for _, c in distiller.parts.components() if _owns(c) for p in c.parameters()}
    owners: Iterable[Kind] = [c for n, c in distiller.parts.components() if not n.startswith("teacher.")]
    found = {id(p): p for c in owners for p in c.parameters() if p.requires_grad and id(p) not in own}
    return list(found.values())


def _owns(component: Kind) -> bool:
    return component.own_optimizer is not None


def _tuple(value: str | list[str] | None) -> tuple[str, ...] | None:
    return None if value is None else (value,) if isinstance(value, str) else tuple(value)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _matching_modules(student: Student, patterns: list[str]) -> tuple[nn.Module, ...]:
    found = tuple(m for n, m in student.named_modules() if n and _matches(n, patterns))
    if patterns and not found:
        raise InputError("student.hold_eval", "no module matches", given=patterns)
    return found


def _unique(name: str, taken: Iterable[str]) -> str:
    names = set(taken)
    number = 2
    unique = name = name.replace(".", "-")  # a module's name may hold no dot
    while unique in names:
        unique, number = f"{name}-{number}", number + 1
    return unique
