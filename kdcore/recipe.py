"""Recipes: TOML in, a checked recipe out. This is phase one, tables and names; it imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kdcore import plugins
from kdcore.errors import InputError
from kdcore.source import Source, located, read, recipes_of
from kdcore.tables import Recipe, StageTable, TrainTable, Use
from kdcore.validation import check_model

__all__ = ["Source", "check", "components", "located", "merge", "parse", "parse_stage", "read", "recipes_of"]
NESTED_TABLES = frozenset(Recipe.model_fields) - {"name", "description", "seed", "stage", "export"}


def check(source: Source) -> Recipe:
    """Types, ranges and names. Raises InputError with the place in the file; asks no component."""
    try:
        recipe = parse(source.tree)
        for place, kind, table in components(recipe):
            plugins.registry().find(kind, table.use, f"{place}.use")
    except InputError as error:
        raise located(error, source) from None
    return recipe


def parse(tree: Mapping[str, Any]) -> Recipe:
    """The tables of a recipe: types and ranges; what refers to a teacher or a stage of the recipe exists."""
    if not set(tree) - {"name"}:
        hint = "it needs at least [data] and [student]; kd schema shows all"
        raise InputError("", "the recipe is empty", hint=hint)
    recipe = check_model(Recipe, tree, "")
    if recipe.data.use == "module" and not recipe.data.source:
        raise InputError("data.source", "missing", allowed="package.module:callable")
    if "student" in recipe.teacher:
        raise InputError("teacher.student", "a teacher may not be called so", hint="it is the student's name")
    for name, teacher in recipe.teacher.items():
        if teacher.train is not None:
            teacher_train(recipe, name)
    for place, wanted in _teachers_named(recipe):
        if wanted not in recipe.teacher:
            names = list(recipe.teacher) or ["none"]
            raise InputError(place, "no teacher of this name", given=wanted, allowed=names)
    stages = [stage_name(stage, index) for index, stage in enumerate(recipe.stage)]
    for index, name in enumerate(stages):
        if name in stages[:index]:
            raise InputError(f"stage.{index}.name", "two stages have this name", given=name)
    return recipe


def _teachers_named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for index, loss in enumerate(recipe.loss):
        names = [loss.teacher] if isinstance(loss.teacher, str) else loss.teacher or []
        yield from ((f"loss.{index}.teacher", name) for name in names)
    if recipe.router:
        yield from (("router.teachers", name) for name in recipe.router.teachers or [])


def components(recipe: Recipe) -> Iterator[tuple[str, str, Use]]:
    """(place, kind, table) of each component that the recipe or one of its stages names, in its order."""
    yield from _own_components(recipe)
    for index, stage in enumerate(recipe.stage):
        for place, kind, table in _own_components(parse_stage(recipe, stage, f"stage.{index}")):
            if place.partition(".")[0] in stage.params:  # what the stage lays over the recipe
                yield f"stage.{index}.{place}", kind, table


def _own_components(recipe: Recipe) -> Iterator[tuple[str, str, Use]]:
    for key, value in recipe:
        kind = "exporter" if key == "export" else key
        if isinstance(value, Use):
            yield key, kind, value
        elif isinstance(value, list | dict):
            rows = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{key}.{name}", kind, table) for name, table in rows)


def parse_stage(recipe: Recipe, stage: StageTable, place: str) -> Recipe:
    """The recipe as a stage sees it: the stage's own tables laid over the recipe's."""
    over = {key: value for key, value in stage.params.items() if key in NESTED_TABLES}
    if not over:
        return recipe
    try:
        return parse({**merge(recipe.model_dump(exclude_unset=True), over), "stage": []})
    except InputError as error:
        error.under(place)
        raise


def stage_name(stage: StageTable, index: int) -> str:
    return stage.name or f"{index + 1}-{stage.use.replace(':', '-')}"


def teacher_train(recipe: Recipe, name: str) -> TrainTable:
    """How a teacher is trained: its own ``train`` laid over the recipe's; its steps or epochs replace both."""
    own = recipe.teacher[name].train or {}
    base = recipe.train.model_dump(exclude_unset=True)
    if "epochs" in own or "steps" in own:
        base = {key: value for key, value in base.items() if key not in ("epochs", "steps")}
    return check_model(TrainTable, merge(base, own), f"teacher.{name}.train")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: tables are merged, everything else (arrays too) is replaced.

    A table that names another component (``use``) replaces the old one whole.
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same = value.get("use", old.get("use")) == old.get("use")
            value = merge(old if same else {}, value)
        out[key] = value
    return out
