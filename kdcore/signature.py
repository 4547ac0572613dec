"""The signature is the schema: a component's parameters, checked by a pydantic model made from its signature.

A class's typed arguments are its parameters. Of a plain loss function the keyword-only arguments are
parameters; the positional ones are tensors, bound by name (``kdcore.kinds.FunctionLoss``).
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import pkgutil
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from kdcore.errors import InputError, cause, nearest
from kdcore.validation import check_model, members

_EMPTY = inspect.Parameter.empty
_KINDS = ("Teacher", "Student", "Router", "Loss", "Augmentation", "Stage", "Probe")


@dataclass(frozen=True)
class Schema:
    """What a callable takes. ``tensors``: names bound from models' outputs; ``open``: takes any keyword."""

    name: str
    params: dict[str, inspect.Parameter] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    open: bool = False
    doc: str = ""

    @cached_property
    def model(self) -> type[BaseModel]:
        """The pydantic model: strict types, unknown keys refused unless the callable takes any keyword.

        Its fields are aliases, so a parameter may have any name (``copy``, ``model_dump``, ``_x``).
        """
        config = ConfigDict(
            extra="allow" if self.open else "forbid",
            strict=True,
            arbitrary_types_allowed=True,
            allow_inf_nan=False,
        )
        fields: dict[str, Any] = {}
        for index, (name, p) in enumerate(self.params.items()):
            default = ... if p.default is _EMPTY else p.default
            fields[f"p{index}"] = (_field_type(p.annotation), Field(default, alias=name))
        title = "".join(c if c.isalnum() else "_" for c in self.name)
        try:
            with warnings.catch_warnings(action="ignore"):  # what an annotation means is its author's affair
                return create_model(title, __config__=config, **fields)
        except Exception as error:  # pydantic has many ways to say that it cannot use an annotation
            raise InputError("", f"{self.name}: its signature makes no schema: {cause(error)}") from error

    def nested(self, name: str) -> str | None:
        """The kind in lower case, when ``name`` is typed as one or an array of one: it takes ``use``."""
        return next(filter(None, map(_kind, _leaves(self.params[name].annotation))), None)

    def is_callable(self, name: str) -> bool:
        return any(each is collections.abc.Callable for each in _leaves(self.params[name].annotation))

    def validate(self, given: Mapping[str, Any], place: str) -> dict[str, Any]:
        """The parameters that were given, checked. Nested kinds and callables stay as text."""
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
        checked = check_model(self.model, given, place, self.name)
        own = {name: f"p{index}" for index, name in enumerate(self.params)}
        extra = checked.model_extra or {}
        return {key: getattr(checked, own[key]) if key in own else extra[key] for key in given}


def schema_of(target: Callable[..., Any], name: str, *, is_loss: bool = False) -> Schema:
    """The schema of a class or function. ``is_loss``: a function's positional arguments are tensors."""
    try:
        function = _function(target)
        parameters = list(inspect.signature(function).parameters.values())
        hints = _hints(function)
    except (ValueError, TypeError) as error:
        raise InputError("", f"{name}: its signature cannot be read: {cause(error)}") from error
    if inspect.isclass(target):
        parameters = parameters[1:]
    parameters = [p.replace(annotation=hints.get(p.name, _untyped(p))) for p in parameters]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_tensors = is_loss and not inspect.isclass(target)
    tensors = [p for p in parameters if p.kind in positional] if takes_tensors else []
    for each in tensors:
        if each.default is not _EMPTY and each.default is not None:
            raise InputError(
                "", f"{name}: {each.name!r} has a default: a loss function's parameters follow a *"
            )
    wanted = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, *positional) and p not in tensors]
    return Schema(
        name,
        {p.name: p for p in wanted},
        tuple(p.name for p in tensors),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
        inspect.getdoc(target) or "",
    )


def import_string(text: Any, place: str) -> Any:
    """What ``package.module:attribute`` names, or an InputError."""
    module, _, attribute = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not module or not attribute:
        raise InputError(place, "not an import string", given=text, allowed="package.module:attribute")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            if not hasattr(found, part):
                names = [n for n in dir(found) if not n.startswith("_")]
                raise InputError(place, f"{module!r} has no {part!r}", given=text, hint=nearest(part, names))
            found = getattr(found, part)
    except InputError as error:
        error.place = error.place or place
        raise
    except (Exception, SystemExit) as error:  # somebody's module may raise anything
        hint = _near_module(module) if isinstance(error, ModuleNotFoundError) else None
        raise InputError(place, f"cannot import {module!r}: {cause(error)}", given=text, hint=hint) from error
    return found


def _near_module(name: str) -> str | None:
    """A hint for the first part of a dotted module name that does not exist."""
    paths: Any = None
    parts = name.split(".")
    for index, part in enumerate(parts):
        names = [m.name for m in pkgutil.iter_modules(paths)]
        if part not in names:
            return nearest(".".join(parts[: index + 1]), [".".join([*parts[:index], n]) for n in names])
        paths = getattr(sys.modules.get(".".join(parts[: index + 1])), "__path__", [])
    return None


def _function(target: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose arguments count; a class without an ``__init__`` of its own takes none."""
    if not inspect.isclass(target):
        return target
    owner = next(each for each in inspect.getmro(target) if "__init__" in vars(each))
    # by its owner: some libraries put a function of their own in the place of torch.nn.Module.__init__
    inherited = owner is object or (owner.__module__, owner.__name__) == ("torch.nn.modules.module", "Module")
    return (lambda self: None) if inherited else target.__init__


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations, resolved; one that does not (a name under TYPE_CHECKING) leaves the others be."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:
        function = inspect.unwrap(function)
        each = getattr(function, "__annotations__", {})
        scope = getattr(function, "__globals__", {})
        return dict(item for name, text in each.items() for item in _hint(name, text, scope))


def _hint(name: str, text: Any, scope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    holder = types.SimpleNamespace(__annotations__={name: text})
    try:
        yield from typing.get_type_hints(holder, scope, include_extras=True).items()
    except Exception:  # third-party annotations may be anything: untyped is better than refused
        return


def _untyped(parameter: inspect.Parameter) -> Any:
    return _EMPTY if isinstance(parameter.annotation, str) else parameter.annotation


def _leaves(annotation: Any) -> list[Any]:
    """The plain types inside unions, Annotated and containers; every Callable[...] as Callable."""
    found = []
    for each in members(annotation):
        origin, inner = typing.get_origin(each), typing.get_args(each)
        if collections.abc.Callable in (each, origin):
            found.append(collections.abc.Callable)
        elif origin in (list, tuple, collections.abc.Sequence):
            found += [leaf for part in inner for leaf in _leaves(part)]
        else:
            found.append(each)
    return found


def _kind(annotation: Any) -> str | None:
    """``loss`` for the class Loss or one that is derived from it, and so on for each kind."""
    bases = inspect.getmro(annotation) if inspect.isclass(annotation) else ()
    return next(
        (b.__name__.lower() for b in bases if b.__module__ == "kdcore.kinds" and b.__name__ in _KINDS), None
    )


def _field_type(annotation: Any) -> Any:
    """What pydantic checks: anything, where ``Builder`` still has to import or build what was given."""
    built = (each is collections.abc.Callable or _kind(each) for each in _leaves(annotation))
    return Any if annotation is _EMPTY or any(built) else annotation
