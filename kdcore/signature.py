"""The signature is the schema: a component's parameters, checked by a pydantic model made from its signature.

A class's typed arguments are its parameters. Of a plain loss function the keyword-only arguments are
parameters; the positional ones are tensors, bound by name (``kdcore.function_loss.FunctionLoss``).
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import pkgutil
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

from pydantic import ConfigDict, Field, create_model

from kdcore.errors import InputError, blame, cause, nearest
from kdcore.tables import Table
from kdcore.types import KINDS
from kdcore.validation import check_model

_EMPTY = inspect.Parameter.empty


class Parameters(Table):
    """What the models of signatures have in common."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    noun = "parameter"


@dataclass(frozen=True)
class Schema:
    """What a callable takes. ``tensors``: names bound from models' outputs; ``open``: takes any keyword."""

    name: str
    params: dict[str, inspect.Parameter] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    open: bool = False
    doc: str = ""

    @cached_property
    def model(self) -> type[Parameters]:
        """The pydantic model: strict types, unknown keys refused unless the callable takes any keyword.

        Its fields are aliases, so a parameter may have any name (``copy``, ``model_dump``, ``_x``).
        """
        fields: dict[str, Any] = {}
        for index, (name, p) in enumerate(self.params.items()):
            annotation = Any if p.annotation is _EMPTY or _made(p.annotation) else p.annotation
            default = ... if p.default is _EMPTY else p.default
            fields[f"p{index}"] = (annotation, Field(default, alias=name))
        config = {"title": self.name, "extra": "allow" if self.open else "forbid"}
        problem = f"{self.name}: its signature makes no schema"
        with (
            blame("", problem),
            warnings.catch_warnings(action="ignore"),
        ):  # an annotation is its author's affair
            return create_model("Parameters", __base__=Parameters, __cls_kwargs__=config, **fields)

    def made(self, name: str) -> str | None:
        """What a recipe writes for ``name``: "callable" an import string, a kind a table with ``use``."""
        return next(iter(_made(self.params[name].annotation)), None)

    def validate(self, given: Mapping[str, Any], place: str) -> dict[str, Any]:
        """``given`` checked and converted; defaults are left to the callable. InputError names the place."""
        checked = dict(check_model(self.model, given, place))
        fields = {name: f"p{index}" for index, name in enumerate(self.params)}
        return {key: checked[fields.get(key, key)] for key in given}

    def fill(
        self, given: Mapping[str, Any], place: str, make: Callable[[str, Any, str], Any]
    ) -> dict[str, Any]:
        """``validate``, then what the parameters are called with: import strings are imported, and every
        component that is typed here is what ``make(kind, table or reference, place)`` makes of it."""
        return {
            key: self._filled(key, value, f"{place}.{key}", make) if key in self.params else value
            for key, value in self.validate(given, place).items()
        }

    def _filled(self, key: str, value: Any, place: str, make: Callable[[str, Any, str], Any]) -> Any:
        kind = self.made(key)
        if kind == "callable":
            return value if value is None or callable(value) else import_string(value, place)
        if kind and isinstance(value, list):
            return [self._filled(key, each, f"{place}.{index}", make) for index, each in enumerate(value)]
        if kind and isinstance(value, Mapping | str | int | float):
            is_table = isinstance(value, Mapping) and isinstance(value.get("use"), str)
            if not is_table and not str(value).startswith("@"):
                allowed = f'a table with use (a {kind}), or "@name"'
                raise InputError(place, "wrong type", given=value, allowed=allowed)
        return make(kind, value, place) if kind else value


def schema_of(target: Callable[..., Any], name: str, place: str = "", *, is_loss: bool = False) -> Schema:
    """The schema of a class or function. ``is_loss``: a function's positional arguments are tensors."""
    with blame(place, f"{name}: its signature cannot be read"):
        parameters = _parameters(target)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    binds = is_loss and not inspect.isclass(target)
    tensors = {p.name: p for p in named if binds and p.kind is not p.KEYWORD_ONLY}
    for each in tensors.values():
        if each.default is not _EMPTY and each.default is not None:
            problem = f"{name}: {each.name!r} has a default: a loss function's parameters follow a *"
            raise InputError(place, problem)
    params = {p.name: p for p in named if p.name not in tensors}
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Schema(name, params, tuple(tensors), is_open, inspect.getdoc(target) or "")


def import_string(text: Any, place: str) -> Any:
    """What ``package.module:attribute`` names, or an InputError."""
    module, _, attribute = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not module or not attribute:
        raise InputError(place, "not an import string", given=text, allowed="package.module:attribute")
    try:
        return attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # somebody's module may raise anything
        raise InputError(place, f"cannot import: {cause(error)}", given=text, hint=_near(error)) from error


def _near(error: BaseException) -> str | None:
    """The nearest spelling of a module or an attribute that an import did not find."""
    if isinstance(error, AttributeError):
        return nearest(error.name, dir(error.obj))
    if not isinstance(error, ModuleNotFoundError):
        return None
    parent, dot, _ = (error.name or "").rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", []) if parent else None
    found = [module.name for module in pkgutil.iter_modules(folders, parent + dot)]
    near = nearest(error.name, found, cutoff=0.8)  # a short name is like one of hundreds by chance
    return near or "it must be installed, or lie beside the recipe"


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters with their annotations resolved; one that does not resolve counts as untyped."""
    function: Any = target
    if inspect.isclass(target):
        owner = next(each for each in inspect.getmro(target) if "__init__" in vars(each))
        # by its owner: some libraries put a function of their own in the place of torch.nn.Module.__init__
        if owner.__module__ in ("builtins", "torch.nn.modules.module"):
            return []  # no __init__ of its own
        function = target.__init__
    while isinstance(function, partial):
        function = function.func
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    found = inspect.signature(target).parameters.values()
    return [p.replace(annotation=_resolved(p.annotation, scope)) for p in found]


def _resolved(annotation: Any, scope: dict[str, Any]) -> Any:
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, scope, include_extras=True)["it"]
    except Exception:  # a name under TYPE_CHECKING, or somebody's nonsense: untyped is better than refused
        return _EMPTY


def _made(annotation: Any) -> list[str]:
    """What a value of this type is made of in a recipe: a "callable", or components of a kind, by its name.

    Looks into unions, Annotated and arrays. A class derived from a kind counts as that kind.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if collections.abc.Callable in (annotation, origin):
        return ["callable"]
    if origin in (typing.Annotated, typing.Union, types.UnionType, list, tuple, collections.abc.Sequence):
        return [each for part in inner for each in _made(part)]
    bases = inspect.getmro(annotation) if inspect.isclass(annotation) else ()
    names = [base.__name__.lower() for base in bases if base.__module__ == "kdcore.kinds"]
    return [name for name in names if name in KINDS][:1]
