"""From the parts of a run to a step that can train: set up, tapped, and tried on one small real batch (phase three)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kdcore.context import RunContext
from kdcore.counts import Counts
from kdcore.distill import Distiller
from kdcore.errors import InputError, blame
from kdcore.kinds import Augmentation, Kind, evaluating, frozen
from kdcore.parts import Parts
from kdcore.taps import Taps
from kdcore.types import Batch, Outputs

FORMS = {"classification": "BC", "language": "BLV", "segmentation": "BCHW"}  # axes of logits
DEBUG = "kd run --debug shows where"


def prepare(distiller: Distiller, run: RunContext) -> None:
    """Attach the run, call setup, set taps, and try everything on one small real batch, on the device.

    The models' setup comes first and the taps after it, so that a loss can see in its own what it will read.
    """
    parts = distiller.parts
    distiller.attach(run)
    _set_draws(parts, run)
    run.reseed("setup")
    models = [(name, each) for name, each in parts.components() if name.startswith(("student", "teacher."))]
    _set_up(models)
    for teacher in parts.teachers.values():
        frozen(teacher)
    distiller.train().to(run.device)
    _set_taps(parts)
    _set_up(each for each in parts.components() if each not in models)
    distiller.to(run.device)
    with torch.no_grad(), evaluating(distiller), blame("", "the recipe fails on its first batch", hint=DEBUG):
        run.reseed("dry run")
        _try(distiller, run.sample)


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
            with blame(name, "its setup fails", hint=DEBUG):
                setup()


def _set_taps(parts: Parts) -> None:
    """One Taps a model, holding the paths that any loss reads there; and all that each teacher is asked for."""
    paths: dict[str, dict[str, str]] = {}
    for slot in parts.losses:
        sides = {"student": ("student",), "teacher": slot.teachers}
        for side in slot.reads:
            if side not in sides:
                raise InputError(f"{slot.loss.place}.reads", "no such side", given=side, allowed=sides)
        for side, models in sides.items():
            names = [want.partition(".")[2] for want in slot.loss.wants() if want.startswith(f"{side}.")]
            mapping = slot.reads.get(side, {})
            for name, path in mapping.items():
                place = f"{slot.loss.place}.reads.{side}.{name}"
                if name not in names:
                    raise InputError(place, "the loss does not read this", allowed=names)
                for model in models:
                    paths.setdefault(model, {})[path] = place
            for teacher in slot.teachers if side == "teacher" else ():
                parts.needs.setdefault(teacher, set()).update(mapping.get(name, name) for name in names)
    for teacher in parts.routed if parts.router is not None else ():
        parts.needs.setdefault(teacher, set()).add("logits")
    for model, places in paths.items():
        owner = parts.student if model == "student" else parts.teachers[model]
        if getattr(owner, "live", True):  # a cached teacher gives tensors by these very paths
            parts.taps[model] = Taps(owner.model, {path: path for path in places}, places)


def _try(distiller: Distiller, batch: Batch) -> None:
    """Shapes agree, every name that is read is given, and every term can be computed."""
    parts = distiller.parts
    for stream in batch.streams:
        part = batch.part(stream)
        said = _asked(distiller, "student", part, parts.student.place or "student")
        if not batch.parts:  # what a stream of several is for, its losses know
            _check_judged(parts, said, part)
        for name in parts.needs:
            _check_classes(said, _asked(distiller, name, part, f"teacher.{name}"), parts, name)
    for augmentation in parts.augmentations.values():
        batch = augmentation(batch)
    now = distiller.hear(batch, Counts())
    bad = [name for name, (_, value) in now.terms.items() if not value.isfinite()]
    if bad and (found := distiller.culprit(now)) is not None:  # else a term of so few samples may be so
        problem = f"{found[1]!r} is not finite in the first batch; nor is {', '.join(bad)}"
        raise InputError(found[0], problem)


def _asked(distiller: Distiller, name: str, part: Batch, place: str) -> Outputs:
    """A model's answer; every module that is tapped must have been called."""
    shapes = {k: tuple(v.shape) for k, v in part.items() if isinstance(v, torch.Tensor)}
    with blame(place, "the model fails on the first batch", given=shapes):
        said = distiller.ask(name, part)
    taps = distiller.parts.taps.get(name)
    for path in taps.names if taps is not None else ():
        if path not in said:
            raise InputError(place, f"its forward never calls the module {path!r}, which a loss reads")
    return said


def _check_classes(student: Outputs, teacher: Outputs, parts: Parts, name: str) -> None:
    """Where a loss compares their logits, both have as many classes."""
    logits = {"student.logits", "teacher.logits"}
    reading = [s.loss for s in parts.losses if name in s.teachers and logits <= set(s.loss.wants())]
    if all(getattr(loss, "any_classes", False) for loss in reading):
        return
    if student.logits is not None and teacher.logits is not None:
        mine, theirs = (
            z.shape[1] if z.dim() in (2, 4) else z.shape[-1] for z in (student.logits, teacher.logits)
        )
        if mine != theirs:
            problem = f"the teacher has {theirs} classes, the student {mine}"
            raise InputError(f"teacher.{name}", problem, hint="give both the same label list or vocabulary")


def _check_judged(parts: Parts, said: Outputs, batch: Batch) -> None:
    """The task's metrics take the student's answers: of its form, as many classes as the data have."""
    task, logits, place = parts.task, said.logits, parts.student.place or "student"
    form = FORMS.get(task.table.use)
    if form and logits is not None and logits.dim() != len(form):
        problem = f"{task.table.use!r} judges logits [{', '.join(form)}]"
        raise InputError(
            "task.use", problem, given=tuple(logits.shape), hint="another task, or another model"
        )
    classes = task.classes if task.table.use == "classification" else None
    if classes and logits is not None and logits.shape[1] < classes:
        problem = f"the student has {logits.shape[1]} classes, the data {classes}"
        raise InputError(place, problem, hint="give the model an output for each class")
    inferred: Any = parts.student.infer(said)
    if not isinstance(inferred, Mapping):
        given, allowed = type(inferred).__name__, 'a dict of tensors, for example {"logits": ...}'
        raise InputError(place, "infer() gives tensors by name", given=given, allowed=allowed)
    shapes = {k: tuple(v.shape) for k, v in inferred.items() if isinstance(v, torch.Tensor)}
    problem, allowed = "the task's metrics cannot judge what it infers", f"{task.classes} classes"
    with blame(place, problem, given=shapes, allowed=allowed):
        task.meter().update(inferred, said, batch)
