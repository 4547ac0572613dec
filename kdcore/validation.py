"""Pydantic's complaints in our words: place, what was given, what is allowed, the nearest right spelling."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import ValidationError

from kdcore.errors import InputError, nearest
from kdcore.tables import FORMS, Table

M = TypeVar("M", bound=Table)
# how pydantic's type of error begins -> what is wrong; what is allowed stands behind "Input should be"
_PROBLEMS = {
    "finite": "not finite",
    "greater": "out of range",
    "less": "out of range",
    "literal": "not one of the choices",
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

    def helps(each: InputError) -> tuple[bool, int, bool]:
        return each.problem.startswith("unknown"), each.place.count("."), each.problem != "wrong type"

    found = [_translated(row, model, given) for row in error.errors(include_url=False)]
    first = max(found, key=helps)
    alike = [each.allowed for each in found if (each.place, each.problem) == (first.place, first.problem)]
    first.allowed = " or ".join(dict.fromkeys(filter(None, alike)))
    if more := len({each.place for each in found}) - 1:
        first.problem += f" (and {more} more)"
    return first


def _translated(row: Any, model: type[Table], given: Any) -> InputError:
    """One of pydantic's errors as ours."""
    steps, value = _steps(row["loc"], given), row["input"]
    place, title = ".".join(steps), model.model_config.get("title")
    if row["type"] == "missing":
        name = str(row["loc"][-1])
        return InputError(name, f"{title} needs {name!r}", hint=f"add {name} = ...").under(place)
    if row["type"] == "extra_forbidden":
        names = _names_at(model, steps[:-1])
        problem, hint = f"unknown {model.noun} of {title}", nearest(steps[-1], names)
        return InputError(place, problem, given=value, allowed=names or "none", hint=hint)
    if row["type"] == "string_pattern_mismatch":
        pattern = row["ctx"]["pattern"]
        allowed = FORMS.get(pattern, f"text that matches {pattern}")
        return InputError(place, "not of this form", given=value, allowed=allowed)
    message = str(row["msg"]).removeprefix("Value error, ").partition(", unable")[0]
    message = message.replace("an object", "a table")  # as TOML calls it
    _, should, allowed = message.rpartition("Input should be ")
    if not should:
        return InputError(place, message[:1].lower() + message[1:], given=value)
    problem = _PROBLEMS.get(row["type"].partition("_")[0], "wrong type")
    choices = re.findall("'(.*?)'", allowed)
    return InputError(place, problem, given=value, allowed=choices or allowed)


def _steps(location: Iterable[int | str], given: Any) -> list[str]:
    """The steps of pydantic's location that are in the input: without its names for a union's members."""
    found = []
    for step in location:
        with suppress(LookupError, TypeError):
            given = given[step]
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
