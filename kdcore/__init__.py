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
    from kdcore.api import build, cache, check, run
    from kdcore.comparison import compare
    from kdcore.kinds import Augmentation, Exporter, Loss, Probe, Router, Stage, Student, Teacher, frozen
    from kdcore.shipping import export

__version__ = "0.1.0"
__all__ = ["Batch", "Component", "Data", "InputError", "KDError", "Outputs", "TopK", "Unembed"]
__all__ += ["conventions", "hookimpl", "lazy"]
__all__ += ["build", "cache", "check", "compare", "export", "run"]
__all__ += ["Augmentation", "Exporter", "Loss", "Probe", "Router", "Stage", "Student", "Teacher", "frozen"]


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


_WHERE = {
    "compare": "comparison",
    "export": "shipping",
    **dict.fromkeys(("build", "cache", "check", "run"), "api"),
}
__getattr__ = lazy(__name__, **{name: _WHERE.get(name, "kinds") for name in __all__ if name not in globals()})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
