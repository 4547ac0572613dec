"""The core's own components: enough to run plain distillation, and no paper's method."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore.hookspecs import hookimpl
from kdcore.types import Component


@hookimpl
def kd_teachers() -> Iterator[Component]:
    yield Component("module", "kdcore.models:ModuleTeacher", "any torch module, from an import string")
    yield Component(
        "self", "kdcore.models:SelfTeacher", "the student itself: its initial, EMA or current weights"
    )
    yield Component("cached", "kdcore.caching.teacher:CachedTeacher", "what kd cache kept of another teacher")


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component("module", "kdcore.models:ModuleStudent", "any torch module, from an import string")


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component("kd", "kdcore.losses:kd_loss", "plain distillation: T^2 KL(teacher || student)")
    yield Component("task", "kdcore.losses:TaskLoss", "the task's own loss as a term, to weigh or place it")


@hookimpl
def kd_stages() -> Iterator[Component]:
    yield Component(
        "distill", "kdcore.stages:Distill", "the standard procedure: teachers, student, evaluation"
    )
    yield Component("rounds", "kdcore.rounds:Rounds", "repeat a stage, each round with its own artefacts")
    yield Component("collect", "kdcore.rounds:Collect", "run a model over a split and keep what it says")
