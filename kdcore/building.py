"""From a checked recipe to the parts of a run: components made, their references resolved, put together."""

from __future__ import annotations

import fnmatch
import inspect
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kdcore import kinds
from kdcore.data import Source, key_seed
from kdcore.errors import InputError, blame
from kdcore.function_loss import FunctionLoss
from kdcore.kinds import Kind, Loss, Student, Teacher, frozen, held
from kdcore.parts import Parts, Slot
from kdcore.recipe import is_artefact, schema
from kdcore.tables import LossTable, Recipe
from kdcore.task import Task


class Builder:
    """Makes components of a recipe, with references resolved. One a stage."""

    def __init__(self, seed: int, artefacts: Mapping[str, Any] | None = None) -> None:
        self.seed, self.artefacts = seed, artefacts or {}
        self.built: dict[str, Any] = {}

    def make(self, kind: str, use: str, params: Mapping[str, Any], place: str) -> Any:
        """An instance of a component; its initial weights depend on the seed and its place alone."""
        target, found = schema(kind, use, f"{place}.use")
        given = {key: self._artefact(value, f"{place}.{key}") for key, value in params.items()}
        values = found.fill(given, place, self._nested)
        if kind == "loss" and not inspect.isclass(target):
            values = {"function": target, "tensors": found.tensors, "params": values}
            target = FunctionLoss
        torch.manual_seed(key_seed(self.seed, "weights", place))
        with blame(place, f"{found.name} refused its parameters"):
            try:
                instance = target(**values)
            except InputError as error:  # a constructor says "teacher.checkpoint": it knows its kind alone
                error.place = re.sub(rf"^{kind}(?=\.|$)", place, error.place or kind)
                raise
        wanted = getattr(kinds, kind.capitalize())
        if kind != "exporter" and not isinstance(instance, wanted):
            problem = f"{found.name} makes a {type(instance).__name__}, which is no {wanted.__name__}"
            raise InputError(f"{place}.use", problem, hint=f"its class derives from kdcore.{wanted.__name__}")
        if isinstance(instance, Kind):
            instance.place = place
        self.built[place.rpartition(".")[2]] = instance
        return instance

    def _nested(self, kind: str, value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            return self.make(kind, value["use"], {k: v for k, v in value.items() if k != "use"}, place)
        if isinstance(value, str) and value.startswith("@"):
            return _Reference(_named(value, self.built, place, "nothing of this name is built here"))
        return value

    def _artefact(self, value: Any, place: str) -> Any:
        """``"@stage.artefact"`` is what an earlier stage left."""
        return _named(value, self.artefacts, place, "no such artefact") if is_artefact(value) else value


def _named(reference: str, things: Mapping[str, Any], place: str, problem: str) -> Any:
    if reference[1:] not in things:
        raise InputError(place, problem, given=reference, allowed=sorted(things) or "none yet")
    return things[reference[1:]]


class _Reference:
    """An instance that is used but not owned: calling it calls the instance, and it is no child module."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instance(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instance, name)


def assemble(recipe: Recipe, source: Source, builder: Builder) -> Parts:
    """Every part of a run, built; taps are set by ``preparing.prepare``, after ``setup``."""
    parts = alone(recipe, source, make_student(recipe, builder), recipe.student.view)
    parts.task_weight = recipe.task.weight
    for name, table in recipe.teacher.items():
        parts.teachers[name] = frozen(make_teacher(recipe, name, builder))  # type: ignore[assignment]
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


def alone(recipe: Recipe, source: Source, student: Student, view: Mapping[str, str]) -> Parts:
    """A model that learns from the labels: the recipe's task is all there is."""
    task, streams = Task(recipe.task, source.data.classes), _tuple(recipe.task.stream)
    return Parts(student, task, views={"student": view}, task_streams=streams, forward=recipe.data.forward)


def make_student(recipe: Recipe, builder: Builder) -> Student:
    """The recipe's student; what it does not train takes no gradient, what it holds in eval mode stays there."""
    table = recipe.student
    student: Student = builder.make("student", table.use, table.params, "student")
    modules, parameters = dict(student.named_modules()), dict(student.named_parameters())
    for name in _matching(modules, table.hold_eval, "student.hold_eval"):
        held(modules[name])
    if table.train is not None:
        chosen = _matching(parameters, table.train, "student.train")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
    return student


def make_teacher(recipe: Recipe, name: str, builder: Builder) -> Teacher:
    """A teacher of the recipe as it is before any training; InputError where it is to be trained and cannot be."""
    table = recipe.teacher[name]
    teacher: Teacher = builder.make("teacher", table.use, table.params, f"teacher.{name}")
    if table.train is not None and teacher.live and teacher.trainee() is None:
        problem = f"a teacher of use = {table.use!r} cannot be trained here"
        raise InputError(f"teacher.{name}.train", problem)
    return teacher


def to_train(recipe: Recipe) -> list[str]:
    """The teachers that are trained before the student: a cached one keeps its ``train`` table and is not."""
    asked = [(name, table) for name, table in recipe.teacher.items() if table.train is not None]
    return [name for name, table in asked if getattr(schema("teacher", table.use)[0], "live", True)]


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
        given = f"train.accumulate = {recipe.train.accumulate}"
        raise InputError(place, problem, given=given, hint="take accumulate out, or lower batch_size")
    name = _unique(table.name or table.use, [slot.name for slot in parts.losses])
    return Slot(name, loss, table.weight, teachers, _tuple(table.stream), table.reads)


def _tuple(value: str | list[str] | None) -> tuple[str, ...] | None:
    return None if value is None else (value,) if isinstance(value, str) else tuple(value)


def _matching(names: Iterable[str], patterns: list[str], place: str) -> set[str]:
    """The names that a pattern matches; "" is the whole, and never meant."""
    found = {name for pattern in patterns for name in fnmatch.filter(names, pattern) if name}
    if patterns and not found:
        raise InputError(place, "nothing matches", given=patterns)
    return found


def _unique(name: str, taken: Iterable[str]) -> str:
    """``name`` or ``name-2``, ...; a module's name may hold no dot."""
    name = name.replace(".", "-")
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(each for each in numbered if each not in taken)
