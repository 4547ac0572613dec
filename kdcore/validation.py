"""Pydantic's complaints in our words: place, what was given, what is allowed, the nearest right spelling."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kdcore.errors import InputError, nearest

M = TypeVar("M", bound=BaseModel)
# what a recipe's author writes, in TOML's names
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "an array",
    "model_type": "a table",
    "string_type": "a string",
    "tuple_type": "an array",
}
_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def check_model(model: type[M], given: Mapping[str, Any], place: str, what: str) -> M:
    """``given`` as the model has it, or an InputError that names the place.

    Types are strict, but what TOML cannot write is taken as JSON has it: an array for a tuple or a set, a
    string for a path.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = error
    try:
        return model.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise _in_words(error, model, given, place, what) from None
    except (TypeError, ValueError, RecursionError):  # holds what JSON has not: the first complaint stands
        raise _in_words(first, model, given, place, what) from None


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, with Annotated taken off."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for each in typing.get_args(annotation) for m in members(each)]
    return [annotation]


def _in_words(
    error: ValidationError, model: type[BaseModel], given: Mapping[str, Any], place: str, what: str
) -> InputError:
    """The complaint that helps most: an unknown key first, then the deepest place, and a type's last."""
    rows = [(_place(row, given), row) for row in error.errors(include_url=False)]
    path, first = max(rows, key=_weight)
    more = len({where for where, _ in rows}) - 1
    count = f" (and {more} more)" if more else ""
    where, key = ".".join([*([place] if place else []), *map(str, path)]), str(path[-1]) if path else ""
    if first["type"] == "extra_forbidden":
        names, problem = _keys_at(model, path[:-1]), f"unknown key of {what}{count}"
        return InputError(where, problem, given=first["input"], allowed=names, hint=nearest(key, names))
    if first["type"] == "missing":
        return InputError(where, f"{what} needs {key!r}{count}", hint=f"add {key} = ...")
    problem = _complaint(first)[0]
    same = (text for at, row in rows for told, text in [_complaint(row)] if at == path and told == problem)
    allowed = " or ".join(dict.fromkeys(filter(None, same)))
    hint = nearest(first["input"], _literals(first)) if first["type"] == "literal_error" else None
    return InputError(where, f"{problem}{count}", given=first["input"], allowed=allowed, hint=hint)


def _weight(row: tuple[tuple[int | str, ...], Any]) -> tuple[bool, int, bool]:
    """Of a union's members all complain: the one that came furthest is what was meant."""
    path, problem = row
    return problem["type"] == "extra_forbidden", len(path), problem["type"] not in _EXPECTED


def _complaint(row: Any) -> tuple[str, str]:
    """(problem, what is allowed) of one of pydantic's errors."""
    kind, context = row["type"].replace("_parsing", "_type"), row.get("ctx", {})
    if kind in _EXPECTED:
        return "wrong type" if kind != "finite_number" else "not finite", _EXPECTED[kind]
    if kind in _BOUNDS:
        sign, key = _BOUNDS[kind]
        bound = context[key]
        return "out of range", f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}"
    if kind == "literal_error":
        return "not one of the choices", str(context["expected"])
    message = str(row["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:], ""


def _literals(row: Any) -> list[str]:
    return str(row["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")


def _place(row: Any, given: Any) -> tuple[int | str, ...]:
    """The part of pydantic's location that stands in the input: without its names for a union's members."""
    path: list[int | str] = []
    absent = row["type"] in ("missing", "extra_forbidden")
    for step in row["loc"]:
        inside = isinstance(given, Mapping) and step in given
        inside = inside or (isinstance(given, list | tuple) and isinstance(step, int) and step < len(given))
        if inside:
            given = given[step]
        if inside or (absent and step == row["loc"][-1]):
            path.append(step)
    return tuple(path)


def _keys_at(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at ``path`` inside a nested model."""
    here = [model]
    for step in path:
        here = [m for each in here for m in members(_inside(each, step))]
    return sorted(name for each in here for name in _fields(each))


def _inside(annotation: Any, step: int | str) -> Any:
    arguments = typing.get_args(annotation)
    return _fields(annotation).get(str(step)) or (arguments[-1] if arguments else None)


def _fields(model: Any) -> dict[str, Any]:
    return {f.alias or name: f.annotation for name, f in getattr(model, "model_fields", {}).items()}
