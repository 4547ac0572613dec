"""The stages of a recipe: all tried before there is a run folder, then run in it, one after the other."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdcore import building, optimizers, parallel, plugins, recipe
from kdcore.checkpoint import replacing, write_json, write_text
from kdcore.folder import IDENTITY, placed, portable, same_recipe
from kdcore.progress import Progress
from kdcore.signals import graceful
from kdcore.stages import StageRun, device_of, doubts, trainee
from kdcore.tables import Recipe, StageTable

STANDARD = StageTable(use="distill", name="distill")  # what a recipe without stages runs


class StageOf(NamedTuple):
    """One stage of a recipe: its place in it, its name, its table, and the recipe as it sees it."""

    place: str
    name: str
    table: StageTable
    recipe: Recipe


def stages(whole: Recipe) -> Iterator[StageOf]:
    """The stages of a recipe in their order."""
    for index, table in enumerate(whole.stage or [STANDARD]):
        place = f"stage.{index}"
        view = recipe.parse_stage(whole, table, place).model_copy(update={"stage": [table]})
        yield StageOf(place, recipe.stage_name(table, index), table, view)


def check(whole: Recipe, say: Callable[[str], None]) -> None:
    """Phases two and three. Stages that need earlier artefacts are tried when they start. ``say`` is given warnings."""
    recipe.check_signatures(whole)
    with tempfile.TemporaryDirectory() as scratch:
        for each in stages(whole):
            if each.table.use == "distill" and '"@' not in json.dumps(each.recipe.model_dump(), default=str):
                for doubt in _try(StageRun(each.recipe, "check", Path(scratch))):
                    say(f"warning: {doubt}")


def _try(trial: StageRun) -> list[str]:
    """Build and set up everything that a stage of ``distill`` will, on a small real batch; keep only warnings."""
    view = trial.recipe
    teachers = {name: trial.of_teacher(name) for name in view.teacher}
    trains = {name: recipe.teacher_train(view, name) for name in building.to_train(view)}
    for train in trains.values():
        device_of(train)
    parts = building.assemble(view, trial.source, trial.builder())
    _, context = trial.context(parts)
    optimizers.optimizer_of(view.train.optimizer, optimizers.trainable(parts), "train.optimizer")
    optimizers.own_optimizers(parts, view)
    if view.export is not None:
        parts.student.inputs(context.sample.part(context.sample.streams[0]))
    for name, train in trains.items():
        teachers[name].context(trainee(teachers[name], name)[1], train)
    return doubts(trial, parts)


def run(whole: Recipe, folder: Path, progress: Progress, force: bool = False) -> dict[str, Any]:
    """Run every stage that is not done in ``folder``, then finish; the results, as results.json has them."""
    if (folder / "results.json").exists():
        return dict(json.loads((folder / "results.json").read_text("utf-8")))
    if whole.train.threads:
        torch.set_num_threads(whole.train.threads)
    artefacts: dict[str, Any] = {}
    results: dict[str, Any] = {}
    with graceful():
        for each in stages(whole):
            inside = folder / "stages" / each.name
            given = StageRun(each.recipe, each.name, inside, artefacts, progress, force=force)
            found = _left(each, given, folder)
            artefacts |= {f"{each.name}.{key}": value for key, value in found.items()}
            results |= found.get("results", {})
        if not parallel.rank():
            _finish(whole, folder, artefacts, results)
        parallel.barrier()
    return results


def _left(stage: StageOf, given: StageRun, folder: Path) -> dict[str, Any]:
    """The artefacts of a stage: what it noted when it was done before, else it runs."""
    note, identity = given.folder / "artefacts.json", given.identity()
    if note.exists():
        same_recipe(given.folder, identity)
        return dict(placed(json.loads(note.read_text("utf-8")), folder))
    parallel.make_folder(given.folder)
    found = dict(given.builder().make("stage", stage.table.use, stage.table.params, stage.place).run(given))
    if not parallel.rank():
        write_text(given.folder / IDENTITY, identity)
        write_json(note, portable(found, folder))
    return found


def _finish(whole: Recipe, folder: Path, artefacts: dict[str, Any], results: dict[str, Any]) -> None:
    """Student, probes, results, report and export: what the run leaves at the top of its folder."""
    from kdcore import report, shipping, summary

    last = next((v for k, v in reversed(artefacts.items()) if k.endswith(".student")), None)
    if last:
        with replacing(folder / "student.safetensors") as draft:
            shutil.copyfile(last, draft)
    results["seed"], results["versions"] = whole.seed, versions(whole)
    results["setup"] = summary.rows(whole, results)
    if whole.probe:
        results["probes"] = shipping.measure_probes(whole, folder)
    if whole.export is not None:
        shutil.rmtree(folder / "artefact", ignore_errors=True)  # of a run that was killed before its results
        results["export"] = shipping.export(folder)
    report.write(whole, folder, results)
    write_json(folder / "results.json", results)  # last: what has it is finished


def versions(whole: Recipe) -> dict[str, str]:
    """Python, torch, kdcore and the distribution of every component that the recipe names."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for _, kind, table in recipe.components(whole):
        entry, _ = plugins.registry().find(kind, table.use)
        found[entry.distribution] = entry.version
    return {**found, "kdcore": importlib.metadata.version("kdcore")}
