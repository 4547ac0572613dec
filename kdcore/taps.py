"""Taps: read or replace the tensors inside a model by module path, without editing the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kdcore.errors import InputError

Replace = Mapping[str, Callable[[Tensor], Tensor]]


class _Complete(Exception):  # noqa: N818 - a signal, never an error
    """Every tap was reached and nothing further is wanted."""


class Taps:
    """Forward hooks on named modules of ``root``.

    ``paths`` maps a name to a module path: ``layer3`` taps the module's output, ``layer3.in`` its first
    input; of a tuple or list the first tensor is taken. Nothing is recorded outside ``reading``.
    """

    def __init__(
        self, root: nn.Module, paths: Mapping[str, str], place: str | Mapping[str, str] = "reads"
    ) -> None:
        """``place``: where in a recipe the paths stand, or where each of them does, for the error."""
        self.names = tuple(paths)
        self._now: tuple[dict[str, Tensor], Replace, bool] | None = None
        modules = {path: module for path, module in root.named_modules() if path}
        for name, path in paths.items():
            wants_input = path.endswith(".in") and path not in modules
            module = modules.get(path.removesuffix(".in") if wants_input else path)
            if module is None:
                where = f"{place}.{name}" if isinstance(place, str) else place[name]
                raise InputError(where, "no module at this path of the model", given=path, allowed=modules)
            if wants_input:
                module.register_forward_pre_hook(self._input_hook(name), with_kwargs=True)
            else:
                module.register_forward_hook(self._output_hook(name))

    @contextmanager
    def reading(self, replace: Replace | None = None, stop: bool = False) -> Iterator[dict[str, Tensor]]:
        """Record into the yielded dict during this block. ``stop``: end the forward once all are recorded.

        ``replace`` gives a tap's new value from its old one, for this block only.
        """
        if replace and (unknown := set(replace) - set(self.names)):
            raise KeyError(f"no tap named {sorted(unknown)}; there are {list(self.names)}")
        store: dict[str, Tensor] = {}
        before, self._now = self._now, (store, replace or {}, stop)
        try:
            yield store
        except _Complete:
            pass
        finally:
            self._now = before

    def _seen(self, name: str, value: Any) -> Any:
        """Record, and return the value that the model goes on with."""
        if self._now is None:
            return value
        store, replace, stop = self._now
        store[name] = _tensor(value)
        if name in replace:
            store[name] = replace[name](store[name])
            value = _with_tensor(value, store[name])
        if stop and len(store) == len(self.names):
            raise _Complete
        return value

    def _output_hook(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, args, output: self._seen(name, output)

    def _input_hook(self, name: str) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
        """The first input, by position or else by keyword."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if self._now is None:
                return None
            if args:
                return (self._seen(name, args[0]), *args[1:]), kwargs
            key = next(iter(kwargs), "")
            return args, {**kwargs, key: self._seen(name, kwargs.get(key))}

        return hook


def _tensor(value: Any) -> Tensor:
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"a tap reads tensors; here is {type(value).__name__}")
    return value


def _with_tensor(value: Any, tensor: Tensor) -> Any:
    if isinstance(value, tuple | list):
        items = [_with_tensor(value[0], tensor), *value[1:]]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a named tuple
    return tensor
