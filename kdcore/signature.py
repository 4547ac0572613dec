"""The signature is the schema: a component's parameters, checked by a pydantic model made from its signature.

A class's typed arguments are its parameters. Of a plain loss function the keyword-only arguments are
parameters; the positional ones are tensors, bound by name (``kdcore.kinds.FunctionLoss``).
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from kdcore.errors import InputError, nearest

_EMPTY = inspect.Parameter.empty
_KINDS = ("Teacher", "Student", "Router", "Loss", "Augmentation", "Stage", "Probe")


@dataclass(frozen=True)
class Schema:
    """What a callable takes. ``tensors``: names bound from the models' outputs; ``open``: takes any keyword."""

    name: str
    params: dict[str, inspect.Parameter] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    open: bool = False
    doc: str = ""

    @cached_property
    def model(self) -> type[BaseModel]:
        """The pydantic model: strict types, unknown keys refused unless the callable takes any keyword."""
        fields: dict[str, Any] = {
            n: (_field_type(p.annotation), ... if p.default is _EMPTY else p.default) for n, p in self.params.items()
        }
        config = ConfigDict(
            extra="allow" if self.open else "forbid",
            strict=True,
            arbitrary_types_allowed=True,
            protected_namespaces=(),
            allow_inf_nan=False,
        )
        return create_model(_identifier(self.name), __config__=config, **fields)

    def nested(self, name: str) -> str | None:
        """The kind in lower case, when parameter ``name`` is typed as one and so takes a table with ``use``."""
        for each in _members(self.params[name].annotation):
            for base in inspect.getmro(each) if inspect.isclass(each) else ():
                if base.__module__ == "kdcore.kinds" and base.__name__ in _KINDS:
                    return base.__name__.lower()
        return None

    def is_callable(self, name: str) -> bool:
        return any(
            each is collections.abc.Callable or typing.get_origin(each) is collections.abc.Callable
            for each in _members(self.params[name].annotation)
        )

    def validate(self, given: Mapping[str, Any], place: str) -> dict[str, Any]:
        """The parameters, checked; defaults are left to the callable. Nested kinds and callables stay as text."""
        if not self.open:
            for key in given:
                if key not in self.params:
                    raise InputError(
                        f"{place}.{key}",
                        f"unknown parameter of {self.name}",
                        given=given[key],
                        allowed=sorted(self.params) or "none",
                        hint=nearest(key, self.params),
                    )
        plain = {
            k: _as_declared(v, self.params[k].annotation if k in self.params else _EMPTY) for k, v in given.items()
        }
        return check_model(self.model, plain, place, self.name)


def check_model(model: type[BaseModel], given: Mapping[str, Any], place: str, what: str) -> dict[str, Any]:
    """``given`` as the model has it (only the keys that were given), or an InputError that names the place."""
    try:
        checked = model.model_validate(dict(given))
    except ValidationError as error:
        raise _in_words(error, model, place, what) from None
    return {key: getattr(checked, key) for key in given}


def _in_words(error: ValidationError, model: type[BaseModel], place: str, what: str) -> InputError:
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join([place, *(str(part) for part in first["loc"])]).strip(".")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    key = str(first["loc"][-1]) if first["loc"] else ""
    names = _keys_at(model, first["loc"][:-1])
    if first["type"] == "extra_forbidden":
        return InputError(
            where, f"unknown key of {what}{more}", given=first["input"], allowed=names, hint=nearest(key, names)
        )
    if first["type"] == "missing":
        return InputError(where, f"{what} needs {key!r}{more}", hint=f"add {key} = ...")
    message = first["msg"][0].lower() + first["msg"][1:]
    return InputError(where, f"{message}{more}", given=first["input"])


def _keys_at(model: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed at ``path`` inside a nested model."""
    for step in path:
        model = model.model_fields[step].annotation if hasattr(model, "model_fields") and step in model.model_fields else 0
        model = next((m for m in _members(model) if hasattr(m, "model_fields")), 0)
    return sorted(getattr(model, "model_fields", {}))


def schema_of(target: Callable[..., Any], name: str, *, is_loss: bool = False) -> Schema:
    """The schema of a class or function. ``is_loss``: a function's positional arguments are tensors."""
    try:
        function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
        parameters = list(inspect.signature(function).parameters.values())
        hints = _hints(function)
    except (ValueError, TypeError, NameError) as error:
        raise InputError("", f"{name}: its signature cannot be read: {error}") from error
    if inspect.isclass(target):
        parameters = parameters[1:]
    parameters = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in parameters]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_tensors = is_loss and not inspect.isclass(target)
    return Schema(
        name,
        {
            p.name: p
            for p in parameters
            if p.kind is p.KEYWORD_ONLY or (p.kind in positional and not takes_tensors)
        },
        tuple(p.name for p in parameters if p.kind in positional) if takes_tensors else (),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
        inspect.getdoc(target) or "",
    )


def import_string(text: Any, place: str) -> Any:
    """What ``package.module:attribute`` names, or an InputError."""
    module, _, attribute = str(text).partition(":")
    if not module or not attribute:
        raise InputError(place, "not an import string", given=text, allowed="package.module:attribute")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # somebody's module may raise anything
        raise InputError(
            place, f"cannot import {module!r}: {type(error).__name__}: {error}", given=text
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(
                place, f"{module!r} has no {part!r}", given=text, hint=nearest(part, [n for n in dir(found) if n[0] != "_"])
            )
        found = getattr(found, part)
    return found


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # third-party annotations that do not resolve: untyped is better than refused
        return {}


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union, with Annotated taken off."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, getattr(__import__("types"), "UnionType", None)):
        return [m for each in typing.get_args(annotation) for m in _members(each)]
    return [annotation]


def _field_type(annotation: Any) -> Any:
    if annotation is _EMPTY:
        return Any
    for each in _members(annotation):
        origin = typing.get_origin(each) or each
        if origin is collections.abc.Callable or (inspect.isclass(each) and each.__module__ == "kdcore.kinds"):
            return Any
    return annotation


def _as_declared(value: Any, annotation: Any) -> Any:
    """TOML has arrays, not tuples, and writes 1 for 1.0."""
    if isinstance(value, list) and any((typing.get_origin(m) or m) is tuple for m in _members(annotation)):
        return tuple(value)
    return value


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
