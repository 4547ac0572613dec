"""Pydantic's complaints in our words: place, what was given, what is allowed, the nearest right spelling."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from kdcore.errors import InputError, nearest
from kdcore.tables import Table

M = TypeVar("M", bound=Table)
# pydantic's type of error -> what is wrong, and what is allowed, in the names that TOML has
_WORDS = {
    "bool_type": ("wrong type", "true or false"),
    "dict_type": ("wrong type", "a table"),
    "model_type": ("wrong type", "a table"),
    "float_type": ("wrong type", "a number"),
    "int_type": ("wrong type", "an integer"),
    "list_type": ("wrong type", "an array"),
    "tuple_type": ("wrong type", "an array"),
    "string_type": ("wrong type", "a string"),
    "finite_number": ("not finite", "a finite number"),
    "greater_than": ("out of range", "> {gt}"),
    "greater_than_equal": ("out of range", ">= {ge}"),
    "less_than": ("out of range", "< {lt}"),
    "less_than_equal": ("out of range", "<= {le}"),
    "literal_error": ("not one of the choices", "{expected}"),
}


def check_model(model: type[M], given: Mapping[str, Any], place: str) -> M:
    """``given`` as the model has it, or an InputError that names the place.

    Types are strict, but what TOML cannot write is taken as JSON has it: an array for a tuple or a set, a
    string for a path.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        problem = error
    try:
        return model.model_validate_json(json.dumps(given))
    except ValidationError as error:
        problem = error
    except (TypeError, ValueError, RecursionError):  # holds what JSON has not: the first complaint stands
        pass
    raise _in_words(problem, model, given).under(place)


def _in_words(error: ValidationError, model: type[Table], given: Mapping[str, Any]) -> InputError:
    """The complaint that helps most. Of a union's members all complain: the one that came furthest was meant."""
    found = [_translated(row, model, given) for row in error.errors(include_url=False)]
    first = max(found, key=_weight)
    alike = [each.allowed for each in found if (each.place, each.problem) == (first.place, first.problem)]
    first.allowed = " or ".join(dict.fromkeys(filter(None, alike)))
    if more := len({each.place for each in found}) - 1:
        first.problem += f" (and {more} more)"
    return first


def _weight(error: InputError) -> tuple[bool, int, bool]:
    return error.problem.startswith("unknown"), error.place.count("."), error.problem != "wrong type"


def _translated(row: Any, model: type[Table], given: Any) -> InputError:
    """One of pydantic's errors as ours."""
    steps, kind = _steps(row["loc"], given), row["type"].replace("_parsing", "_type")
    place, value, context = ".".join(steps), row["input"], row.get("ctx", {})
    if kind == "missing":
        name, title = str(row["loc"][-1]), model.model_config.get("title")
        return InputError(name, f"{title} needs {name!r}", hint=f"add {name} = ...").under(place)
    if kind == "extra_forbidden":
        names = _names_at(model, steps[:-1])
        hint = nearest(steps[-1], names)
        return InputError(place, f"unknown {model.noun}", given=value, allowed=names or "none", hint=hint)
    message = str(row["msg"]).removeprefix("Value error, ")
    problem, allowed = _WORDS.get(kind, (message[:1].lower() + message[1:], ""))
    numbers = {name: f"{each:g}" if isinstance(each, float) else each for name, each in context.items()}
    hint = nearest(value, re.findall("'(.*?)'", str(context.get("expected", ""))))
    return InputError(place, problem, given=value, allowed=allowed.format(**numbers), hint=hint)


def _steps(location: Iterable[int | str], given: Any) -> list[str]:
    """The steps of pydantic's location that are in the input: without its names for a union's members."""
    found = []
    for step in location:
        try:
            given = given[step]
        except (LookupError, TypeError):
            continue
        found.append(str(step))
    return found


def _names_at(annotation: Any, steps: list[str]) -> list[str]:
    """The keys of the tables that may stand at a place inside a type, through arrays, tables and unions."""
    models = getattr(annotation, "model_fields", {})
    fields = {field.alias or name: field.annotation for name, field in models.items()}
    if fields:
        return _names_at(fields.get(steps[0]), steps[1:]) if steps else sorted(fields)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated)
    rest = steps if is_union else steps[1:]
    return [name for each in typing.get_args(annotation) for name in _names_at(each, rest)]
