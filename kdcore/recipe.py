"""A recipe checked before anything is built: its tables, the names in it, the parameters of what is named.

``check`` is phase one, tables and names; it imports nothing that the recipe names. ``check_signatures`` is
phase two. Neither needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kdcore import plugins
from kdcore.errors import InputError
from kdcore.hookspecs import GROUP
from kdcore.signature import Schema, import_string, schema_of
from kdcore.source import Source, leaves, located, read, recipes_of
from kdcore.tables import Recipe, StageTable, TrainTable, Use
from kdcore.validation import check_model

__all__ = ["Source", "check", "components", "located", "merge", "parse", "parse_stage", "read", "recipes_of"]
CORE_MODULES = ("kdcore.zoo", "kdcore.datasets")  # what --plugins-only allows of the core itself


def check(source: Source) -> Recipe:
    """Types, ranges and names. Raises InputError with the place in the file; asks no component."""
    with located(source):
        recipe = parse(source.tree)
        for place, kind, table in components(recipe):
            plugins.registry().find(kind, table.use, f"{place}.use")
    return recipe


def parse(tree: Mapping[str, Any]) -> Recipe:
    """The tables of a recipe: types and ranges; what refers to a teacher or a stage of the recipe exists."""
    recipe = check_model(Recipe, tree, "")
    if "student" in recipe.teacher:
        raise InputError("teacher.student", "a teacher may not be called so", hint="it is the student's name")
    for name in recipe.teacher:
        teacher_train(recipe, name)
    named = {f"loss.{index}.teacher": loss.teacher for index, loss in enumerate(recipe.loss)}
    named["router.teachers"] = recipe.router.teachers if recipe.router else None
    for place, names in named.items():
        for name in [names] if isinstance(names, str) else names or []:
            if name not in recipe.teacher:
                allowed = list(recipe.teacher) or ["none"]
                raise InputError(place, "no teacher of this name", given=name, allowed=allowed)
    stages = [stage_name(stage, index) for index, stage in enumerate(recipe.stage)]
    for index, name in enumerate(stages):
        if name in stages[:index]:
            raise InputError(f"stage.{index}.name", "two stages have this name", given=name)
    return recipe


def components(recipe: Recipe) -> Iterator[tuple[str, str, Use]]:
    """(place, kind, table) of each component that the recipe or one of its stages names, in its order."""
    for place, table in leaves(dict(recipe)):
        if isinstance(table, Use):
            kind = place.partition(".")[0]
            yield place, "exporter" if kind == "export" else kind, table
    for index, stage in enumerate(recipe.stage):
        view = parse_stage(recipe, stage, f"stage.{index}")
        for place, kind, table in components(view) if stage.over else ():
            if place.partition(".")[0] in stage.over:
                yield f"stage.{index}.{place}", kind, table


def parse_stage(recipe: Recipe, stage: StageTable, place: str) -> Recipe:
    """The recipe as a stage sees it: the stage's own tables laid over the recipe's."""
    if not stage.over:
        return recipe
    try:
        return parse({**merge(recipe.model_dump(exclude_unset=True), stage.over), "stage": []})
    except InputError as error:
        raise error.under(place) from None


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


def check_signatures(recipe: Recipe) -> None:
    """Phase two: every component's parameters against its signature. Imports only what the recipe names."""
    for place, kind, table in components(recipe):
        found = _check(kind, {"use": table.use, **table.params}, place)
        if taken := set(type(table).model_fields) & set(found.params):
            names = ", ".join(sorted(taken))
            problem = f"{table.use!r} has parameters that the recipe's table takes for itself: {names}"
            raise InputError(place, problem, hint="the plugin must name them otherwise")


def _check(kind: str, table: Mapping[str, Any], place: str) -> Schema:
    """A component's parameters, and those of the components nested in it."""
    _, found = schema(kind, table["use"], f"{place}.use")
    later = {key for key, value in table.items() if is_artefact(value)}  # there when the stage starts
    given = {key: value for key, value in table.items() if key != "use" and key not in later}
    found = replace(found, params={k: p for k, p in found.params.items() if k not in later})
    found.fill(given, place, lambda *nested: _check(*nested) if isinstance(nested[1], Mapping) else None)
    return found


def schema(kind: str, name: str, place: str = "use") -> tuple[Any, Schema]:
    """The target and the parameters of a component. Imports its module."""
    _, component = plugins.registry().find(kind, name, place)
    target = import_string(component.target, place)
    return target, schema_of(target, component.name, place, is_loss=kind == "loss")


def is_artefact(value: Any) -> bool:
    """``"@stage.artefact"``: what an earlier stage left."""
    return isinstance(value, str) and value.startswith("@") and "." in value


def refuse_code(tree: Any) -> None:
    """--plugins-only: a recipe may name installed components, and functions of their packages, nothing else."""
    for place, value in leaves(tree):
        if isinstance(value, str) and _names_code(value, place):
            problem = "names code, and --plugins-only allows installed components alone"
            raise InputError(place, problem, given=value)


def _names_code(text: str, place: str) -> bool:
    module, _, attribute = text.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if text.endswith(".py") or not all(part.isidentifier() for part in parts):
        return text.endswith(".py")  # a config that is a program
    entries = plugins.registry().entries
    if place.endswith("use") and module in {entry.distribution for entry in entries}:
        return False
    packages = {entry.target.partition(".")[0] for entry in entries if entry.distribution != GROUP}
    if "." in attribute or (module not in CORE_MODULES and parts[0] not in packages):
        return True
    found = import_string(text, place)  # what a module imported from elsewhere is not its own
    return str(getattr(found, "__module__", "")).partition(".")[0] != parts[0]
