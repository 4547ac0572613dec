"""Recipes: TOML in, a checked recipe out. This is phase one, tables and names; it imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kdcore import plugins
from kdcore.errors import InputError, nearest
from kdcore.source import Source, located, read, recipes_of
from kdcore.tables import Recipe, StageTable, TrainTable, Use
from kdcore.validation import check_model

__all__ = ["Source", "check", "components", "located", "merge", "parse", "parse_stage", "read", "recipes_of"]
NESTED_TABLES = (
    "student",
    "teacher",
    "router",
    "augmentation",
    "task",
    "loss",
    "data",
    "train",
    "report",
    "probe",
)


def check(source: Source) -> Recipe:
    """Types, ranges and names. Raises InputError with the place in the file; asks no component."""
    try:
        recipe = parse(source.tree)
        check_names(recipe)
    except InputError as error:
        raise located(error, source) from None
    return recipe


def parse(tree: Mapping[str, Any]) -> Recipe:
    if not set(tree) - {"name"}:
        raise InputError(
            "", "the recipe is empty", hint="it needs at least [data] and [student]; kd schema shows all"
        )
    return check_model(Recipe, tree, "", "the recipe")


def check_names(recipe: Recipe) -> None:
    """Every ``use`` is installed, and what refers to a teacher, a stage or a stream of the recipe exists."""
    names = [stage_name(stage, i) for i, stage in enumerate(recipe.stage)]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError(f"stage.{index}.name", "two stages have this name", given=name)
    for prefix, view in views(recipe):
        try:
            _check_references(view)
        except InputError as error:
            error.place = prefix + error.place
            raise
    for place, kind, table in components(recipe):
        plugins.registry().find(kind, table.use, f"{place}.use")


def _check_references(recipe: Recipe) -> None:
    if recipe.data.use == "module" and not recipe.data.source:
        raise InputError("data.source", "missing", allowed="package.module:callable")
    if recipe.train.epochs and recipe.train.steps:
        raise InputError("train", "epochs and steps are both given", hint="keep one")
    for index, loss in enumerate(recipe.loss):
        wanted = [loss.teacher] if isinstance(loss.teacher, str) else loss.teacher or []
        _known(wanted, recipe.teacher, f"loss.{index}.teacher", "teacher")
    if recipe.router:
        _known(recipe.router.teachers or [], recipe.teacher, "router.teachers", "teacher")
    for name, teacher in recipe.teacher.items():
        if name == "student":
            raise InputError(
                "teacher.student", "a teacher may not be called so", hint="the name is the student's"
            )
        if teacher.train is not None:
            teacher_train(recipe, name)


def components(recipe: Recipe) -> Iterator[tuple[str, str, Use]]:
    """(place, kind, table) of each component that the recipe or one of its stages names, in its order."""
    yield from _own_components(recipe)
    for index, stage in enumerate(recipe.stage):
        for place, kind, table in _own_components(parse_stage(recipe, stage, f"stage.{index}")):
            if place.partition(".")[0] in stage.params:  # what the stage lays over the recipe
                yield f"stage.{index}.{place}", kind, table


def views(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(prefix of places, recipe): the recipe itself, then as each of its stages sees it."""
    yield "", recipe
    for index, stage in enumerate(recipe.stage):
        yield f"stage.{index}.", parse_stage(recipe, stage, f"stage.{index}")


def _own_components(recipe: Recipe) -> Iterator[tuple[str, str, Use]]:
    yield "student", "student", recipe.student
    for name, table in recipe.teacher.items():
        yield f"teacher.{name}", "teacher", table
    if recipe.router:
        yield "router", "router", recipe.router
    for kind in ("augmentation", "loss", "stage", "probe"):
        for index, each in enumerate(getattr(recipe, kind)):
            yield f"{kind}.{index}", kind, each
    if recipe.export:
        yield "export", "exporter", recipe.export


def parse_stage(recipe: Recipe, stage: StageTable, place: str) -> Recipe:
    """The recipe as a stage sees it: the stage's own tables laid over the recipe's."""
    over = {key: value for key, value in stage.params.items() if key in NESTED_TABLES}
    if not over:
        return recipe
    tree = merge(recipe.model_dump(exclude_unset=True), over)
    try:
        return parse({**tree, "stage": []})
    except InputError as error:
        error.place = f"{place}.{error.place}"
        raise


def stage_name(stage: StageTable, index: int) -> str:
    return stage.name or f"{index + 1}-{stage.use.replace(':', '-')}"


def teacher_train(recipe: Recipe, name: str) -> TrainTable:
    """How a teacher is trained: its own ``train`` laid over the recipe's; its steps or epochs replace both."""
    own = recipe.teacher[name].train or {}
    base = recipe.train.model_dump(exclude_unset=True)
    if "epochs" in own or "steps" in own:
        base = {key: value for key, value in base.items() if key not in ("epochs", "steps")}
    return check_model(TrainTable, merge(base, own), f"teacher.{name}.train", "the table")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: tables are merged, everything else (arrays too) is replaced.

    A table that names another component (``use``) replaces the old one whole.
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("use", old.get("use")) == old.get("use")
        ):
            value = merge(old, value)
        out[key] = value
    return out


def _known(wanted: Iterable[str], have: Mapping[str, Any], place: str, what: str) -> None:
    for name in wanted:
        if name not in have:
            hint = nearest(name, have)
            raise InputError(
                place, f"no {what} of this name", given=name, allowed=list(have) or "none", hint=hint
            )
