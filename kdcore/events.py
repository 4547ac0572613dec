"""The events of one run: its own plugin manager, holding the recipe's components in the recipe's order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy
from torch import nn

from kdcore.errors import InputError, nearest
from kdcore.hookspecs import EVENT_PREFIXES, EVENTS, GROUP, RunEvents


class _Manager(pluggy.PluginManager):
    """A manager to which a component's methods named like events are its implementations."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        return {} if name in EVENTS and callable(getattr(type(plugin), name, None)) else None


def events_of(components: Iterable[tuple[str, Any]]) -> Any:
    """The caller of all events (``events.before_step(batch=...)``) over (name, component) in their order.

    Raises InputError for a method that looks like an event and is none, or that asks for an argument
    that its event does not have.
    """
    manager = _Manager(GROUP)
    manager.add_hookspecs(RunEvents)
    for name, component in reversed(list(components)):  # pluggy calls the last registered first
        _refuse_misspelt(name, component)
        try:
            manager.register(component, name)
        except pluggy.PluginValidationError as error:
            raise InputError(name, f"{type(component).__name__}: {error}") from error
    return manager.hook


def _refuse_misspelt(name: str, component: Any) -> None:
    for method in dir(type(component)):
        if method.startswith(EVENT_PREFIXES) and method not in EVENTS and not hasattr(nn.Module, method):
            problem = f"{type(component).__name__}.{method} is no event"
            hint = nearest(method, EVENTS) or "a method of another purpose needs another beginning"
            raise InputError(name, problem, allowed=sorted(EVENTS), hint=hint)
