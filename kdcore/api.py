"""From Python: ``kdcore.run``, ``kdcore.check``, ``kdcore.build``, ``kdcore.export``, ``kdcore.compare``."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcore import building, optimizers, parallel, plugins
from kdcore import folder as folders
from kdcore import recipe as recipes
from kdcore.checkpoint import replacing, write_json
from kdcore.errors import InputError
from kdcore.progress import Progress
from kdcore.signals import graceful
from kdcore.source import LOCK
from kdcore.stages import StageRun, device_of
from kdcore.tables import Recipe, StageTable

RecipeLike = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what its stages gave (``results`` as in results.json)."""

    folder: Path
    results: dict[str, Any]

    @property
    def student(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def metrics(self) -> dict[str, float]:
        """The student's metrics on the test split."""
        return dict(self.results.get("test", {}).get("student", {}))


def check(where: RecipeLike, overrides: Iterable[str] = (), *, plugins_only: bool = False) -> Recipe:
    """All three phases: text and names, signatures, then models, taps and shapes on one small real batch."""
    source = recipes.read(where, overrides)
    recipe = recipes.check(source)
    with recipes.located(source), folders.beside(source):
        if plugins_only:
            recipes.refuse_code(source.tree)
        _check_whole(recipe)
    return recipe


def run(
    where: RecipeLike,
    *,
    out: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    plugins_only: bool = False,
) -> Result:
    """Run a recipe in a run folder (``out``, or runs/NAME-TIME) and return what came of it.

    ``resume`` goes on with the folder's run: its locked recipe must equal this one, or ``force`` be set.
    Raises InputError before anything is written when the recipe is wrong.
    """
    source = recipes.read(where, [*overrides, *([] if seed is None else [f"seed={seed}"])])
    recipe = recipes.check(source)
    default = Path("runs") / f"{recipe.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = (Path(out) if out else default).absolute()
    with recipes.located(source), parallel.group(), folders.beside(source):
        if plugins_only:
            recipes.refuse_code(source.tree)
        if not (resume and os.path.exists(folder / LOCK)):
            _check_whole(recipe)
        made = not parallel.rank() and folders.open_folder(folder, source, resume, force)
        parallel.barrier()
        try:
            return _run(recipe, folder, Progress(quiet or bool(parallel.rank())), force)
        except InputError:
            if made:
                folders.discard(folder)
            raise


def build(kind: str, name: str, **params: Any) -> Any:
    """An instance of an installed component: ``kdcore.build("loss", "pld", temperature=2.0)``."""
    return building.Builder(seed=0).make(kind, name, params, name)


def cache(
    where: RecipeLike,
    *,
    teacher: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    quiet: bool = True,
    plugins_only: bool = False,
    **options: Any,
) -> Any:
    """Run a recipe's teacher once and keep what its losses read; see ``kdcore.caching``.

    ``options``: ``codec``, ``k``, ``mass``, ``dtype``. Returns the ``kdcore.caching.Cache``; its folder is the
    ``path`` of ``use = "cached"``. Goes on with what is there.
    """
    from kdcore.caching import Options, write

    source = recipes.read(where, [*overrides, *([] if seed is None else [f"seed={seed}"])])
    recipe = recipes.check(source)
    with recipes.located(source), folders.beside(source), graceful():
        if plugins_only:
            recipes.refuse_code(source.tree)
        recipes.check_signatures(recipe)
        folder = None if out is None else Path(out)
        return write(recipe, folder, teacher, Options(**options), Progress(quiet))


def compare(*args: Any, **kwargs: Any) -> Any:
    """Matched arms of a recipe over seeds; see ``kdcore.comparison.compare``."""
    from kdcore.comparison import compare as function

    return function(*args, **kwargs)


def export(*args: Any, **kwargs: Any) -> Any:
    """A run's student, or any module, as a verified artefact; see ``kdcore.shipping.export``."""
    from kdcore.shipping import export as function

    return function(*args, **kwargs)


def _run(recipe: Recipe, folder: Path, progress: Progress, force: bool = False) -> Result:
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if (folder / "results.json").exists():
        return Result(folder, json.loads((folder / "results.json").read_text("utf-8")))
    artefacts: dict[str, Any] = {}
    results: dict[str, Any] = {}
    stages = recipe.stage or [StageTable(use="distill", name="distill")]
    with graceful():
        for index, table in enumerate(stages):
            name = recipes.stage_name(table, index)
            done = folder / "stages" / name / "artefacts.json"
            if done.exists():
                found = folders.placed(json.loads(done.read_text("utf-8")), folder)
            else:
                found = _stage(recipe, table, index, folder, artefacts, progress, force)
                if not parallel.rank():
                    write_json(done, folders.portable(found, folder))
            artefacts.update({f"{name}.{key}": value for key, value in found.items()})
            results.update(found.get("results", {}))
        if not parallel.rank():
            _finish(recipe, folder, artefacts, results, progress)
        parallel.barrier()
    return Result(folder, results)


def _stage(
    recipe: Recipe,
    table: StageTable,
    index: int,
    folder: Path,
    artefacts: dict[str, Any],
    progress: Progress,
    force: bool,
) -> dict[str, Any]:
    name = recipes.stage_name(table, index)
    view = recipes.parse_stage(recipe, table, f"stage.{index}")
    stage_run = StageRun(view, name, folder / "stages" / name, artefacts, progress, force=force)
    parallel.make_folder(stage_run.folder)
    stage = stage_run.builder().make("stage", table.use, table.params, f"stage.{index}")
    return dict(stage.run(stage_run))


def _finish(
    recipe: Recipe, folder: Path, artefacts: dict[str, Any], results: dict[str, Any], progress: Progress
) -> None:
    """Student, probes, results, report and export: what the run leaves at the top of its folder."""
    from kdcore import report, shipping

    last = next((v for k, v in reversed(artefacts.items()) if k.endswith(".student")), None)
    if last:
        with replacing(folder / "student.safetensors") as draft:
            shutil.copyfile(last, draft)
    results["seed"], results["versions"] = recipe.seed, versions(recipe)
    if recipe.probe:
        results["probes"] = shipping.measure_probes(recipe, folder, artefacts)
    if recipe.export is not None:
        shutil.rmtree(folder / "artefact", ignore_errors=True)  # of a run that was killed before its results
        results["export"] = shipping.export(folder, _recipe=recipe, progress=progress)
    report.write(recipe, folder, results)
    write_json(folder / "results.json", results)  # last: what has it is finished


def versions(recipe: Recipe) -> dict[str, str]:
    """Python, torch, kdcore and the distribution of every component that the recipe names."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for _, kind, table in recipes.components(recipe):
        entry, _ = plugins.registry().find(kind, table.use)
        found[entry.distribution] = entry.version
    return {**found, "kdcore": importlib.metadata.version("kdcore")}


def _check_whole(recipe: Recipe) -> None:
    """Phases two and three. Stages that need earlier artefacts are tried when they start."""
    recipes.check_signatures(recipe)
    stages = recipe.stage or [StageTable(use="distill", name="distill")]
    with tempfile.TemporaryDirectory() as scratch:
        for index, table in enumerate(stages):
            view = recipes.parse_stage(recipe, table, f"stage.{index}")
            if table.use == "distill" and '"@' not in json.dumps(view.model_dump(), default=str):
                _try(StageRun(view, "check", Path(scratch), {}))


def _try(trial: StageRun) -> None:
    """Build and set up everything that a stage of ``distill`` will, on a small real batch; keep nothing."""
    view = trial.recipe
    for name, table in view.teacher.items():
        trial.of_teacher(name)
        if table.train is not None:
            device_of(recipes.teacher_train(view, name))
    parts = building.assemble(view, trial.source, trial.builder())
    for name, table in view.teacher.items():
        if parts.teachers[name].live and table.train is not None and parts.teachers[name].trainee() is None:
            raise InputError(
                f"teacher.{name}.train", f"a teacher of use = {table.use!r} cannot be trained here"
            )
    distiller, context = trial.context(parts)
    trained = building.trainable(distiller)
    if not trained:
        raise InputError("student.train", "nothing is left to train")
    optimizers.optimizer_of(view.train.optimizer, trained, "train.optimizer")
    optimizers.own_optimizers(parts, optimizers.optimizer_tables(view, parts))
    if view.export is not None:
        parts.student.inputs(context.sample.part(context.sample.streams[0]))
