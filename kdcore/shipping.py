"""From a run folder to what leaves it: the student rebuilt, probes measured, the artefact exported."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcore import build
from kdcore import recipe as recipes
from kdcore.checkpoint import load_tensors
from kdcore.errors import InputError
from kdcore.kinds import Student
from kdcore.stages import StageRun
from kdcore.tables import Recipe


def load_run(folder: Path) -> tuple[Recipe, StageRun]:
    """The recipe and the last stage's view of a run folder."""
    lock = folder / "recipe.lock.toml"
    if not lock.exists():
        raise InputError(str(folder), "no run folder: it has no recipe.lock.toml")
    recipe = recipes.parse(tomllib.loads(lock.read_text("utf-8")))
    stages = recipe.stage
    if not stages:
        return recipe, StageRun(recipe, "distill", folder / "stages" / "distill")
    name = recipes.stage_name(stages[-1], len(stages) - 1)
    view = recipes.parse_stage(recipe, stages[-1], f"stage.{len(stages) - 1}")
    return recipe, StageRun(view, name, folder / "stages" / name)


def load_student(folder: Path) -> tuple[Student, StageRun]:
    """The trained student of a run, in eval mode, with everything that its stage left in it."""
    _, run = load_run(folder)
    student = build.make_student(run.recipe, run.builder())
    weights = run.folder / "student" / "weights.safetensors"
    if not weights.exists():
        raise InputError(str(folder), "the run has no trained student yet", hint="kd resume finishes it")
    student.load_state_dict(load_tensors(weights, str(folder)))
    return student.to(run.device).eval(), run  # type: ignore[return-value]


def measure_probes(recipe: Recipe, folder: Path, artefacts: dict[str, Any]) -> dict[str, Any]:
    """What each of the recipe's probes says of the trained models."""
    student, run = load_student(folder)
    run.artefacts = artefacts
    builder = run.builder()
    models: dict[str, nn.Module] = {"student": student}
    for name, table in run.recipe.teacher.items():
        teacher = builder.make("teacher", table.use, table.params, f"teacher.{name}")
        trained = run.folder / f"teacher-{name}" / "teacher.safetensors"
        if trained.exists():
            teacher.load_state_dict(load_tensors(trained, name))
        models[name] = teacher.to(run.device).eval()
    found = {}
    for index, table in enumerate(recipe.probe):
        probe = builder.make("probe", table.use, table.params, f"probe.{index}")
        with torch.no_grad():
            found[table.use] = probe.measure(run, models, run.source)
    return found
