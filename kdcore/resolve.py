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
from kdcore.source import leaves
from kdcore.tables import Recipe, Use

CORE_MODULES = ("kdcore.zoo", "kdcore.datasets")  # what --plugins-only allows of the core itself


def schema(kind: str, name: str, place: str = "use") -> tuple[Any, Schema]:
    """The target and the parameters of a component. Imports its module."""
    _, component = plugins.registry().find(kind, name, place)
    target = plugins.load_target(component, place)
    try:
        return target, schema_of(target, component.name, is_loss=kind == "loss")
    except InputError as error:
        error.under(place)
        raise


def check_signatures(recipe: Recipe) -> None:
    """Phase two: every component's parameters against its signature. Imports only what the recipe names."""
    for place, kind, table in components(recipe):
        found = _check(kind, {"use": table.use, **stage_params(kind, table)}, place)
        if taken := set(type(table).model_fields) & set(found.params):
            names = ", ".join(sorted(taken))
            problem = f"{table.use!r} has parameters that the recipe's table takes for itself: {names}"
            raise InputError(place, problem, hint="the plugin must name them otherwise")


def stage_params(kind: str, table: Use) -> dict[str, Any]:
    """A table's parameters for its component: of a stage without the tables that it lays over the recipe."""
    return {k: v for k, v in table.params.items() if kind != "stage" or k not in NESTED_TABLES}


def _check(kind: str, table: Mapping[str, Any], place: str) -> Schema:
    """A component's parameters, and those of the components nested in it."""
    if not isinstance(table["use"], str):
        raise InputError(f"{place}.use", "wrong type", given=table["use"], allowed="a string")
    _, found = schema(kind, table["use"], f"{place}.use")
    later = {key for key, value in table.items() if is_artefact(value)}  # there when the stage starts
    given = {key: value for key, value in table.items() if key != "use" and key not in later}
    found = replace(found, params={k: p for k, p in found.params.items() if k not in later})
    found.fill(given, place, lambda *nested: _check(*nested) if isinstance(nested[1], Mapping) else None)
    return found


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
