"""Knowledge distillation from recipes: a small core, one pip-installable plugin for each paper's method.

The names below are all that a plugin's light module needs; the rest is imported on use.
"""

from __future__ import annotations

import importlib
from typing import Any

from kdcore.errors import InputError, KDError
from kdcore.hookspecs import hookimpl
from kdcore.types import Batch, Component, Data, Outputs, TopK, Unembed, conventions

__version__ = "0.1.0"

_LAZY = {
    "run": "kdcore.api",
    "check": "kdcore.api",
    "build": "kdcore.api",
    "export": "kdcore.api",
    "compare": "kdcore.api",
    "Augmentation": "kdcore.kinds",
    "Exporter": "kdcore.kinds",
    "Loss": "kdcore.kinds",
    "Probe": "kdcore.kinds",
    "Router": "kdcore.kinds",
    "Stage": "kdcore.kinds",
    "Student": "kdcore.kinds",
    "Teacher": "kdcore.kinds",
    "frozen": "kdcore.kinds",
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
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kdcore' has no attribute {name!r}")
