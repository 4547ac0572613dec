"""From a component's name to its target and parameters, imported and checked: phase two of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdcore import plugins
from kdcore.errors import InputError
from kdcore.hookspecs import GROUP
from kdcore.recipe import NESTED_TABLES, components
from kdcore.signature import Schema, import_string, schema_of
from kdcore.tables import Recipe, Use

CORE_MODULES = ("kdcore.zoo", "kdcore.datasets")  # what --plugins-only allows of the core itself


def schema(kind: str, name: str, place: str = "use") -> tuple[Any, Schema]:
    """The target and the parameters of a component. Imports its module."""
    _, component = plugins.registry().find(kind, name, place)
    target = plugins.load_target(component, place)
    try:
        return target, schema_of(target, component.name, is_loss=kind == "loss")
    except InputError as error:
        error.place = error.place or place
        raise


def check_signatures(recipe: Recipe) -> None:
    """Phase two: every component's parameters against its signature. Imports only what the recipe names."""
    for place, kind, table in components(recipe):
        found = _check(kind, table.use, stage_params(kind, table), place)
        taken = set(type(table).model_fields) & set(found.params)
        if taken:
            names = ", ".join(sorted(taken))
            problem = f"{table.use!r} has parameters that the recipe's table takes for itself: {names}"
            raise InputError(place, problem, hint="the plugin must name them otherwise")


def stage_params(kind: str, table: Use) -> dict[str, Any]:
    """A table's parameters for its component: of a stage without the tables that it lays over the recipe."""
    return {k: v for k, v in table.params.items() if kind != "stage" or k not in NESTED_TABLES}


def _check(kind: str, name: Any, params: Mapping[str, Any], place: str) -> Schema:
    if not isinstance(name, str):
        raise InputError(f"{place}.use", "wrong type", given=name, allowed="a string")
    _, found = schema(kind, name, f"{place}.use")
    given = {key: value for key, value in params.items() if not is_artefact(value)}
    later = params.keys() - given.keys()  # their values are there when the stage starts
    found = replace(found, params={k: p for k, p in found.params.items() if k not in later})
    found.validate(given, place)
    for key, value in given.items():
        _check_built(found, key, value, f"{place}.{key}")
    return found


def _check_built(found: Schema, key: str, value: Any, place: str) -> None:
    """A parameter that ``Builder`` makes: a nested component, or what an import string names."""
    kind = found.nested(key) if key in found.params else None
    if isinstance(value, list) and kind:
        for index, each in enumerate(value):
            _check_built(found, key, each, f"{place}.{index}")
    elif kind and isinstance(value, Mapping):
        if "use" not in value:
            raise InputError(place, f"a {kind} is a table with 'use'", given=value)
        _check(kind, value["use"], {k: v for k, v in value.items() if k != "use"}, place)
    elif kind and isinstance(value, str | int | float) and not str(value).startswith("@"):
        raise InputError(place, "wrong type", given=value, allowed=f'a table with use (a {kind}), or "@name"')
    elif key in found.params and found.is_callable(key) and isinstance(value, str):
        import_string(value, place)
    elif key in found.params and found.is_callable(key) and not callable(value):
        raise InputError(
            place, "wrong type", given=value, allowed="an import string, package.module:attribute"
        )


def is_artefact(value: Any) -> bool:
    """``"@stage.artefact"``: what an earlier stage left."""
    return isinstance(value, str) and value.startswith("@") and "." in value


def refuse_code(tree: Any, place: str = "") -> None:
    """--plugins-only: a recipe may name installed components, and functions of their packages, nothing else."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            refuse_code(value, f"{place}.{key}".strip("."))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            refuse_code(value, f"{place}.{index}")
    elif isinstance(tree, str) and _names_code(tree, place):
        raise InputError(
            place, "names code, and --plugins-only allows installed components alone", given=tree
        )


def _names_code(text: str, place: str) -> bool:
    if text.endswith(".py"):
        return True  # a config that is a program
    module, _, attribute = text.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not all(part.isidentifier() for part in parts):
        return False
    entries = plugins.registry().entries
    if place.endswith("use") and module in {entry.distribution for entry in entries}:
        return False
    packages = {entry.target.partition(".")[0] for entry in entries if entry.distribution != GROUP}
    if "." in attribute or (module not in CORE_MODULES and parts[0] not in packages):
        return True
    found = import_string(text, place)  # what a module imported from elsewhere is not its own
    return str(getattr(found, "__module__", "")).partition(".")[0] != parts[0]
