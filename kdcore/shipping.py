"""From a run folder to what leaves it: the student rebuilt, probes measured, the artefact exported."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcore import building as build
from kdcore import recipe as recipes
from kdcore.checkpoint import load_tensors
from kdcore.errors import InputError
from kdcore.folder import placed
from kdcore.kinds import Deployed, ExportRequest, Student
from kdcore.source import LOCK
from kdcore.stages import StageRun
from kdcore.tables import Recipe
from kdcore.task import LOSS, Task, higher_is_better
from kdcore.types import Batch

SAMPLES = 256


def load_run(folder: Path) -> tuple[Recipe, StageRun]:
    """The recipe and the last stage's view of a run folder, with the artefacts that its stages left."""
    lock = folder / LOCK
    if not lock.exists():
        raise InputError(str(folder), f"no run folder: it has no {LOCK}")
    source = recipes.read(lock)
    sys.path += [str(source.folder)] if str(source.folder) not in sys.path else []
    recipe = recipes.parse(source.tree)
    stages = recipe.stage
    if not stages:
        return recipe, StageRun(recipe, "distill", folder / "stages" / "distill")
    name = recipes.stage_name(stages[-1], len(stages) - 1)
    view = recipes.parse_stage(recipe, stages[-1], f"stage.{len(stages) - 1}")
    run = StageRun(view, name, folder / "stages" / name, _artefacts(folder))
    stage = run.builder().make("stage", stages[-1].use, stages[-1].params, "stage")
    run.recipe = stage.view(view, run.artefacts)
    return recipe, run


def _artefacts(folder: Path) -> dict[str, Any]:
    left = {
        path.parent.name: placed(json.loads(path.read_text("utf-8")), folder.absolute())
        for path in folder.glob("stages/*/artefacts.json")
    }
    return {f"{stage}.{key}": value for stage, each in left.items() for key, value in each.items()}


def load_student(folder: Path) -> tuple[Student, StageRun]:
    """The trained student of a run, in eval mode, with everything that its stage left in it."""
    _, run = load_run(folder)
    student = build.make_student(run.recipe, run.builder())
    weights = run.folder / "student" / "weights.safetensors"
    if not weights.exists():
        raise InputError(str(folder), "the run has no trained student yet", hint="kd resume finishes it")
    student.load_state_dict(load_tensors(weights, str(folder)))
    return student.to(run.device).eval(), run


def measure_probes(recipe: Recipe, folder: Path, artefacts: dict[str, Any]) -> dict[str, Any]:
    """What each of the recipe's probes says of the trained models."""
    student, run = load_student(folder)
    run.artefacts = artefacts
    builder = run.builder()
    models: dict[str, nn.Module] = {"student": student, **_teachers(run)}
    found = {}
    for index, table in enumerate(recipe.probe):
        probe = builder.make("probe", table.use, table.params, f"probe.{index}")
        with torch.no_grad():
            found[table.use] = probe.measure(run, models, run.source)
    return found


def export(
    what: str | Path | nn.Module,
    *,
    out: str | Path | None = None,
    target: str | None = None,
    params: Mapping[str, Any] | None = None,
    request: ExportRequest | None = None,
    progress: Any = None,
    _recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Export a run's student with an installed exporter; ``params`` lie over the recipe's ``[export]``.

    A plain module needs a ``request`` instead of a run folder. Returns rows for a report, ``artefact`` among
    them; raises and leaves nothing at ``out`` where a gate refuses.
    """
    if isinstance(what, nn.Module):
        if request is None or out is None:
            raise InputError("export", "a module needs request= (what to prove it right with) and out=")
        recipe_table: dict[str, Any] = {}
        destination = Path(out)
    else:
        folder = Path(what)
        recipe, _ = load_run(folder)
        table = recipe.export
        recipe_table = {"use": table.use, **table.params} if table else {}
        destination = Path(out) if out else folder / "artefact"
        request = request_of(folder)
    merged = {**recipe_table, **(params or {})}
    use = target or merged.get("use", "onnx")
    merged.pop("use", None)
    exporter = build.Builder(0).make("exporter", use, merged, "export")
    if destination.exists():
        raise InputError(
            "export.out", "something is there already", given=str(destination), hint="name another --out"
        )
    rows: dict[str, Any] = exporter.export_request(request, destination.absolute())
    return {"artefact": str(destination), **rows}


def bench(
    artefact: Path, run_folder: Path | None, batches: Sequence[int], threads: int, target: str = "onnx"
) -> str:
    """The exporter's benchmark of an artefact; with a run folder, beside its student and teacher in torch."""
    exporter = build.Builder(0).make("exporter", target, {}, "bench")
    student = teacher = None
    if run_folder is not None:
        trained, run = load_student(run_folder)
        student = trained.cpu().deploy().eval()
        teacher = next(iter(_teachers(run).values()), None)
        if teacher is not None and hasattr(trained, "input_names"):
            teacher = Deployed(teacher.cpu(), tuple(trained.input_names))  # type: ignore[arg-type]
    return str(exporter.bench(artefact, student, teacher, batches=batches, threads=threads))


def _teachers(run: StageRun) -> dict[str, nn.Module]:
    """The run's teachers, with the weights that were trained in it."""
    builder, models = run.builder(), {}
    for name, table in run.recipe.teacher.items():
        if not getattr(recipes.schema("teacher", table.use)[0], "live", True):
            continue  # a cache answers for its own samples alone, and may be gone by now
        teacher = builder.make("teacher", table.use, table.params, f"teacher.{name}")
        trained = run.folder / f"teacher-{name}" / "teacher.safetensors"
        if trained.exists():
            teacher.load_state_dict(load_tensors(trained, name))
        if teacher.live:
            models[name] = teacher.to(run.device).eval()
    return models


@torch.no_grad()
def request_of(folder: Path) -> ExportRequest:
    """Everything an exporter needs of a finished run: held-out samples, the student's own answers, the metric."""
    student, run = load_student(folder)
    student = student.cpu()
    source, task = run.source, Task(run.recipe.task, run.source.data.classes)
    judged = next((name for name in task.metrics if name != LOSS), "")  # a graph has no training loss
    held = _first(source.loader("val"), SAMPLES)
    view = run.recipe.student.view
    held.update({key: held[name] for key, name in view.items()})
    outputs = student(held)
    rule = {name: value.numpy() for name, value in student.graph(outputs).items()}
    inputs = student.inputs(held)
    shapes, axes = student.shapes(inputs)
    calibration = _first(source.loader("train"), SAMPLES // 2)
    calibration.update({key: calibration[name] for key, name in view.items()})
    target = outputs.target if outputs.target is not None else held.get("target")
    raw = source.data.raw(held["id"].tolist()) if source.data.raw else None
    host = student.host(held)
    metric = _metric(task, judged) if judged and target is not None else None
    reference = None
    if host is not None:
        raw = host[1]
        reference = metric(student.infer(outputs), target.numpy()) if metric and target is not None else None
    return ExportRequest(
        name=run.recipe.name.replace(" ", "-"),
        module=student.deploy().eval(),
        shapes=shapes,
        axes=axes,
        samples={name: value.numpy() for name, value in inputs.items()},
        rule=rule,
        calibration={name: value.numpy() for name, value in student.inputs(calibration).items()},
        raw_samples=dict(raw) if raw is not None else None,
        preprocessing=source.data.preprocessing if host is None else (),
        labels=source.data.labels,
        targets=None if target is None else target.numpy(),
        metric=metric,
        metric_name=judged,
        higher_is_better=bool(judged) and higher_is_better(judged),
        absent=tuple(f"{prefix}" for name in student.training_only for prefix in (name, f"student.{name}")),
        provenance=_provenance(folder, run, source.data.licence),
        host=host and host[0],
        reference_metric=reference,
    )


def _first(loader: Any, count: int) -> Batch:
    found: list[Batch] = []
    for batch in loader:
        found.append(batch)
        if sum(map(len, found)) >= count:
            break
    joined = {
        k: torch.cat([b[k] for b in found])
        if isinstance(found[0][k], torch.Tensor)
        else [v for b in found for v in b[k]]
        for k in found[0]
    }
    batch = Batch(joined)
    return batch.rows(torch.arange(min(count, len(batch))))


def _metric(task: Task, name: str) -> Any:
    """A metric of the task as a function of numpy outputs and targets."""

    def measure(outputs: dict[str, Any], targets: Any) -> float:
        from kdcore.types import Outputs

        meter = task.meter()
        target = torch.from_numpy(np.asarray(targets))
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in outputs.items()}
        meter.update(tensors, Outputs(target=target), Batch({"id": torch.arange(len(target))}))
        return meter.compute()[name]

    return measure


def _provenance(folder: Path, run: StageRun, licence: str) -> dict[str, Any]:
    from kdcore.running import versions

    lock = (folder / "recipe.lock.toml").read_bytes()
    return {
        "recipe": run.recipe.name,
        "recipe_sha256": hashlib.sha256(lock).hexdigest(),
        "components": sorted({table.use for _, _, table in recipes.components(run.recipe)}),
        "versions": versions(run.recipe),
        "seed": run.recipe.seed,
        "data_licence": licence,
    }
