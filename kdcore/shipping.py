"""From a run folder to what leaves it: the student rebuilt, probes measured, the artefact exported."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcore import recipe as recipes
from kdcore.building import Builder, make_student, make_teacher
from kdcore.checkpoint import load_tensors
from kdcore.errors import InputError
from kdcore.folder import placed
from kdcore.kinds import Deployed, ExportRequest, Student
from kdcore.running import stages, versions
from kdcore.source import LOCK
from kdcore.stages import StageRun
from kdcore.streams import concatenated, viewed
from kdcore.tables import Recipe
from kdcore.task import LOSS, Task, higher_is_better, target_of
from kdcore.types import Batch, Outputs

SAMPLES = 256


def load_run(folder: Path) -> tuple[Recipe, StageRun]:
    """The recipe and the last stage's view of a run folder, with the artefacts that its stages left."""
    if not (folder / LOCK).exists():
        raise InputError(str(folder), f"no run folder: it has no {LOCK}")
    source = recipes.read(folder / LOCK)
    sys.path += [str(source.folder)] if str(source.folder) not in sys.path else []
    recipe = recipes.parse(source.tree)
    *_, (place, name, table, view) = stages(recipe)
    run = StageRun(view, name, folder / "stages" / name, _artefacts(folder))
    run.recipe = run.builder().make("stage", table.use, table.params, place).view(view, run.artefacts)
    return recipe, run


def _artefacts(folder: Path) -> dict[str, Any]:
    notes = {path.parent.name: path.read_text("utf-8") for path in folder.glob("stages/*/artefacts.json")}
    left = {stage: placed(json.loads(text), folder.absolute()) for stage, text in notes.items()}
    return {f"{stage}.{key}": value for stage, each in left.items() for key, value in each.items()}


def load_student(folder: Path) -> tuple[Student, StageRun]:
    """The trained student of a run, in eval mode, with everything that its stage left in it."""
    _, run = load_run(folder)
    student = make_student(run.recipe, run.builder())
    weights = run.folder / "student" / "weights.safetensors"
    if not weights.exists():
        raise InputError(str(folder), "the run has no trained student yet", hint="kd resume finishes it")
    student.load_state_dict(load_tensors(weights, str(folder)))
    return student.to(run.device).eval(), run


def load_teachers(run: StageRun) -> dict[str, nn.Module]:
    """The run's teachers, with the weights that were trained in it."""
    builder = run.builder()
    models: dict[str, nn.Module] = {}
    for name, table in run.recipe.teacher.items():
        if not getattr(recipes.schema("teacher", table.use)[0], "live", True):
            continue  # a cache answers for its own samples alone, and may be gone by now
        teacher = make_teacher(run.recipe, name, builder)
        trained = run.folder / f"teacher-{name}" / "teacher.safetensors"
        if trained.exists():
            teacher.load_state_dict(load_tensors(trained, name))
        if teacher.live:
            models[name] = teacher.to(run.device).eval()
    return models


@torch.no_grad()
def measure_probes(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What each of the recipe's probes says of the run's trained models."""
    student, run = load_student(folder)
    builder, models = run.builder(), {"student": student, **load_teachers(run)}
    return {
        table.use: builder.make("probe", table.use, table.params, f"probe.{index}").measure(
            run, models, run.source
        )
        for index, table in enumerate(recipe.probe)
    }


def export(
    what: str | Path,
    *,
    out: str | Path | None = None,
    target: str | None = None,
    params: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Export a run's student with an installed exporter; ``params`` lie over the recipe's ``[export]``.

    Returns rows for a report, ``artefact`` among them; raises and leaves nothing at ``out`` where a gate refuses.
    """
    folder = Path(what)
    table = load_run(folder)[0].export
    given = {**(table.model_dump() if table else {"use": "onnx"}), **(params or {})}
    use = given.pop("use")
    exporter = Builder(0).make("exporter", target or use, given, "export")
    destination = Path(out) if out else folder / "artefact"
    if destination.exists():
        problem, hint = "something is there already", "name another --out"
        raise InputError("export.out", problem, given=str(destination), hint=hint)
    rows: dict[str, Any] = exporter.export_request(request_of(folder), destination.absolute())
    return {"artefact": str(destination), **rows}


def bench(artefact: Path, run_folder: Path | None, batches: Sequence[int], threads: int) -> str:
    """The ONNX exporter's benchmark of an artefact; with a run folder, beside its student and teacher in torch."""
    exporter = Builder(0).make("exporter", "onnx", {}, "bench")
    student, teachers = None, []
    if run_folder is not None:
        trained, run = load_student(run_folder)
        student, names = trained.cpu().deploy().eval(), trained.input_names
        teachers = [Deployed(teacher.cpu(), names) for teacher in load_teachers(run).values()]
    return str(
        exporter.bench(artefact, student, next(iter(teachers), None), batches=batches, threads=threads)
    )


@torch.no_grad()
def request_of(folder: Path) -> ExportRequest:
    """Everything an exporter needs of a finished run: held-out samples, the student's own answers, the metric."""
    student, run = load_student(folder)
    student, data = student.cpu(), run.source.data
    task = Task(run.recipe.task, data.classes)
    judged = next((name for name in task.metrics if name != LOSS), "")  # a graph has no training loss
    held, calibration = _first(run, "val", SAMPLES), _first(run, "train", SAMPLES // 2)
    outputs, inputs, host = student(held), student.inputs(held), student.host(held)
    shapes, axes = student.shapes(inputs)
    target = target_of(outputs, held)
    targets = None if target is None else target.numpy()
    metric = _metric(task, judged) if judged and target is not None else None
    raw = host[1] if host else data.raw(held["id"].tolist()) if data.raw else None
    return ExportRequest(
        name=run.recipe.name.replace(" ", "-"),
        module=student.deploy().eval(),
        shapes=shapes,
        axes=axes,
        samples=_arrays(inputs),
        rule=_arrays(student.graph(outputs)),
        calibration=_arrays(student.inputs(calibration)),
        raw_samples=None if raw is None else dict(raw),
        preprocessing=() if host else data.preprocessing,
        labels=data.labels,
        targets=targets,
        metric=metric,
        metric_name=judged and f"{judged} on {len(held)} samples of the validation split",
        higher_is_better=bool(judged) and higher_is_better(judged),
        absent=tuple(name for own in student.training_only for name in (own, f"student.{own}")),
        provenance=_provenance(folder, run.recipe, data.licence),
        host=host and host[0],
        reference_metric=metric(student.infer(outputs), targets) if host and metric else None,
    )


def _first(run: StageRun, split: str, count: int) -> Batch:
    """The first samples of a split in one batch, as the student sees them."""
    batches = islice(run.source.loader(split), -(-count // run.recipe.data.eval_batch_size))
    whole = concatenated({str(index): batch for index, batch in enumerate(batches)})
    return viewed(whole.rows(torch.arange(min(count, len(whole)))), run.recipe.student.view)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in tensors.items()}


def _metric(task: Task, name: str) -> Callable[[Mapping[str, Any], Any], float]:
    """A metric of the task as a function of numpy outputs and targets."""

    def measure(outputs: Mapping[str, Any], targets: Any) -> float:
        meter = task.meter()
        tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in outputs.items()}
        meter.update(tensors, Outputs(target=torch.from_numpy(np.asarray(targets))), Batch())
        return meter.compute()[name]

    return measure


def _provenance(folder: Path, recipe: Recipe, licence: str) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "recipe_sha256": hashlib.sha256((folder / LOCK).read_bytes()).hexdigest(),
        "components": sorted({table.use for _, _, table in recipes.components(recipe)}),
        "versions": versions(recipe),
        "seed": recipe.seed,
        "data_licence": licence,
    }
