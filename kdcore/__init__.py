"""Knowledge distillation from recipes: a small core, one pip-installable plugin for each paper's method.

The names below are all that a plugin's light module needs; the rest is imported on use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kdcore.errors import InputError, KDError
from kdcore.hookspecs import hookimpl
from kdcore.types import Batch, Component, Data, Outputs, TopK, Unembed, conventions

if TYPE_CHECKING:  # the lazy names, as a type checker has them
    from kdcore.api import build as build
    from kdcore.api import cache as cache
    from kdcore.api import check as check
    from kdcore.api import compare as compare
    from kdcore.api import export as export
    from kdcore.api import run as run
    from kdcore.kinds import Augmentation as Augmentation
    from kdcore.kinds import Exporter as Exporter
    from kdcore.kinds import Loss as Loss
    from kdcore.kinds import Probe as Probe
    from kdcore.kinds import Router as Router
    from kdcore.kinds import Stage as Stage
    from kdcore.kinds import Student as Student
    from kdcore.kinds import Teacher as Teacher
    from kdcore.kinds import frozen as frozen

__version__ = "0.1.0"

_LAZY = {
    "run": "api",
    "check": "api",
    "build": "api",
    "cache": "api",
    "export": "api",
    "compare": "api",
    "Augmentation": "kinds",
    "Exporter": "kinds",
    "Loss": "kinds",
    "Probe": "kinds",
    "Router": "kinds",
    "Stage": "kinds",
    "Student": "kinds",
    "Teacher": "kinds",
    "frozen": "kinds",
}

__all__ = [  # noqa: PLE0604 - the lazy names are strings
    "Batch",
    "Component",
    "Data",
    "InputError",
    "KDError",
    "Outputs",
    "TopK",
    "Unembed",
    "conventions",
    "hookimpl",
    "lazy",
    *_LAZY,
]


def lazy(package: str, **modules: str) -> Callable[[str], Any]:
    """A light module's ``__getattr__``: each name is imported from its module when it is first asked for.

    ``__getattr__ = lazy(__name__, pld_loss="loss")`` makes ``from kd_plugin_pld import pld_loss`` work while
    listing plugins imports no torch.
    """

    def find(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


__getattr__ = lazy(__name__, **_LAZY)
