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

import tomli_w
import torch

from kdcore import building, parallel, plugins
from kdcore import recipe as recipes
from kdcore.checkpoint import replacing, write_json
from kdcore.errors import InputError
from kdcore.progress import Progress
from kdcore.signals import graceful
from kdcore.stages import StageRun
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


def check(where: RecipeLike, overrides: Iterable[str] = ()) -> Recipe:
    """All three phases: text and names, signatures, then models, taps and shapes on one small real batch."""
    source = recipes.read(where, overrides)
    recipe = recipes.check(source)
    try:
        _check_whole(recipe)
    except InputError as error:
        raise recipes.located(error, source) from error.__cause__
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
    if plugins_only:
        _refuse_callables(source.tree)
    folder = Path(out) if out else Path("runs") / f"{recipe.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        with parallel.group(), _working_folder(source.folder):
            if not (resume and (folder / "recipe.lock.toml").exists()):
                _check_whole(recipe)
            _open_folder(folder.resolve() if out else folder, source, recipe, resume, force)
            return _run(recipe, folder.resolve(), Progress(quiet or bool(parallel.rank())))
    except InputError as error:
        raise recipes.located(error, source) from error.__cause__


def build(kind: str, name: str, **params: Any) -> Any:
    """An instance of an installed component: ``kdcore.build("loss", "pld", temperature=2.0)``."""
    return building.Builder(seed=0).make(kind, name, params, name)


def compare(*args: Any, **kwargs: Any) -> Any:
    """Matched arms of a recipe over seeds; see ``kdcore.comparison.compare``."""
    from kdcore.comparison import compare as function

    return function(*args, **kwargs)


def export(*args: Any, **kwargs: Any) -> Any:
    """A run's student, or any module, as a verified artefact; see ``kdcore.shipping.export``."""
    from kdcore.shipping import export as function

    return function(*args, **kwargs)


def _run(recipe: Recipe, folder: Path, progress: Progress) -> Result:
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
                found = json.loads(done.read_text("utf-8"))
            else:
                found = _stage(recipe, table, index, folder, artefacts, progress)
                if not parallel.rank():
                    write_json(done, found)
            artefacts.update({f"{name}.{key}": value for key, value in found.items()})
            results.update(found.get("results", {}))
        if not parallel.rank():
            _finish(recipe, folder, artefacts, results, progress)
        parallel.barrier()
    return Result(folder, results)


def _stage(
    recipe: Recipe, table: StageTable, index: int, folder: Path, artefacts: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    name = recipes.stage_name(table, index)
    view = recipes.parse_stage(recipe, table, f"stage.{index}")
    stage_run = StageRun(view, name, folder / "stages" / name, artefacts, progress)
    stage_run.folder.mkdir(parents=True, exist_ok=True)
    params = building._stage_params("stage", table)
    stage = stage_run.builder().make("stage", table.use, params, f"stage.{index}")
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
    write_json(folder / "results.json", results)
    report.write(recipe, folder, results)


def versions(recipe: Recipe) -> dict[str, str]:
    """Python, torch, kdcore and the distribution of every component that the recipe names."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for _, kind, table in recipes.components(recipe):
        entry, _ = plugins.registry().find(kind, table.use)
        found[entry.distribution] = entry.version
    return {**found, "kdcore": importlib.metadata.version("kdcore")}


def _check_whole(recipe: Recipe) -> None:
    """Phases two and three. Stages that need earlier artefacts are tried when they start."""
    building.check_signatures(recipe)
    stages = recipe.stage or [StageTable(use="distill", name="distill")]
    with tempfile.TemporaryDirectory() as scratch:
        for index, table in enumerate(stages):
            view = recipes.parse_stage(recipe, table, f"stage.{index}")
            if '"@' in json.dumps(view.model_dump(), default=str) or table.use != "distill":
                continue
            trial = StageRun(view, "check", Path(scratch), {})
            for name in view.teacher:
                trial.of_teacher(name)
            parts = building.assemble(view, trial.source, trial.builder())
            _, context = trial.context(parts)
            building.optimizer_of(view.train.optimizer, list(parts.student.parameters()), "train.optimizer")
            if view.export is not None:
                parts.student.inputs(context.sample.part(context.sample.streams[0]))


def _open_folder(folder: Path, source: recipes.Source, recipe: Recipe, resume: bool, force: bool) -> None:
    """Make the run folder, or join the one that is there; the lock says which recipe it belongs to."""
    if parallel.rank():
        parallel.barrier()
        return
    lock = folder / "recipe.lock.toml"
    tree = _tomlable(source.tree)
    if lock.exists():
        import tomllib

        before = tomllib.loads(lock.read_text("utf-8"))
        difference = _difference(before, tree)
        if not resume:
            raise InputError(
                str(folder), "this folder holds a run already", hint="--resume, or another --out"
            )
        if difference and not force:
            raise InputError(
                str(folder),
                f"the recipe changed since the run began: {difference}",
                hint="undo it, or --force",
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(str(folder), "not empty, and no run folder", hint="name another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(lock) as draft:
            draft.write_text(tomli_w.dumps(tree), "utf-8")
    except OSError as error:
        raise InputError(
            str(folder), f"cannot be written: {error.strerror}", hint="name another --out"
        ) from None
    parallel.barrier()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> str:
    rows = []
    for key in sorted({*before, *now}):
        here = f"{place}{key}"
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            rows.append(_difference(old, new, f"{here}."))
        elif old != new:
            rows.append(f"{here}: {old!r} -> {new!r}")
    return "; ".join(row for row in rows if row)


def _tomlable(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(k): _tomlable(v) for k, v in tree.items() if v is not None}
    return [_tomlable(v) for v in tree] if isinstance(tree, list | tuple) else tree


def _refuse_callables(tree: Any, place: str = "") -> None:
    """--plugins-only: a recipe may name installed components and nothing else."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            _refuse_callables(value, f"{place}.{key}".strip("."))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            _refuse_callables(value, f"{place}.{index}")
    elif isinstance(tree, str) and ":" in tree and not tree.startswith("kdcore.") and _is_import(tree):
        raise InputError(
            place, "names code, and --plugins-only allows installed components alone", given=tree
        )


def _is_import(text: str) -> bool:
    module, _, attribute = text.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


class _working_folder:  # noqa: N801 - a context manager
    """Import strings of a recipe may name modules beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __enter__(self) -> None:
        import sys

        if self.folder not in sys.path:
            sys.path.insert(0, self.folder)

    def __exit__(self, *exc: object) -> None:
        pass
