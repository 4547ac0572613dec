"""Arguments of components as trees of tensors: change, compare, take rows, note what a component remembers."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcore.types import Batch, Outputs

Change = Callable[[str, Tensor], Tensor]


def mapped(value: Any, change: Change, path: str = "") -> Any:
    """``value`` with every tensor replaced; paths are like ``student/logits`` or ``batch/target``."""
    if isinstance(value, Tensor):
        return change(path.strip("/"), value)
    if isinstance(value, Outputs):
        names = ("logits", "mask", "target", "unembed", "topk", "tensors")
        return replace(value, **{n: mapped(getattr(value, n), change, _join(path, n)) for n in names})
    if isinstance(value, Batch):
        parts = {k: mapped(v, change, f"{path}/{k}") for k, v in value.parts.items()}
        return Batch({k: mapped(v, change, f"{path}/{k}") for k, v in value.items()}, parts)
    if isinstance(value, Mapping):
        return {k: mapped(v, change, f"{path}/{k}") for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # Unembed, TopK
        pairs = zip(value._fields, value, strict=True)
        return type(value)(*(mapped(v, change, f"{path}/{n}") for n, v in pairs))
    if isinstance(value, list | tuple):
        return type(value)(mapped(v, change, f"{path}/{i}") for i, v in enumerate(value))
    return value


def _join(path: str, name: str) -> str:
    return path if name == "tensors" else f"{path}/{name}"  # a tap is student/NAME


def leaves(value: Any) -> dict[str, Tensor]:
    """Every tensor by its path."""
    found: dict[str, Tensor] = {}
    mapped(value, lambda path, tensor: found.setdefault(path, tensor))
    return found


def copied(value: Any) -> Any:
    return mapped(value, lambda _, tensor: tensor.detach().clone())


def living(value: Any, side: str) -> tuple[Any, dict[str, Tensor]]:
    """A copy whose floating tensors under ``side`` take gradient, and those tensors by path.

    The copy holds clones of them, so that an in-place operation is a fault of its own and raises nothing.
    """
    roots: dict[str, Tensor] = {}

    def change(path: str, tensor: Tensor) -> Tensor:
        new = tensor.detach().clone()
        if not path.startswith(side) or not new.is_floating_point():
            return new
        roots[path] = new.requires_grad_()
        return new.clone()

    return mapped(value, change), roots


def taken(args: Mapping[str, Any], index: Tensor, size: int) -> dict[str, Any]:
    """The samples at ``index``: of tensors and lists whose first axis is the batch's ``size``."""

    def rows(path: str, tensor: Tensor) -> Tensor:
        has_rows = tensor.dim() and len(tensor) == size and not path.endswith(("/weight", "/bias"))
        return tensor[index] if has_rows else tensor

    out: dict[str, Any] = mapped(args, rows)
    for batch in (each for each in out.values() if isinstance(each, Batch)):
        lists = {k: v for k, v in batch.items() if isinstance(v, list) and len(v) == size}
        batch.update({k: [v[i] for i in index.tolist()] for k, v in lists.items()})
    return out


def same(a: Tensor, b: Tensor, rel: float = 1e-4, floor: float = 1e-6) -> bool:
    """Equal shapes, and values that differ by less than ``rel`` of the larger tensor's size."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    scale = max(float(a.abs().max()), float(b.abs().max())) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0, atol=rel * scale + floor, equal_nan=True))


def differing(a: Any, b: Any, rel: float = 1e-4) -> list[str]:
    """The paths at which two trees differ; ``rel = 0`` asks for the same bits."""
    one, two = leaves(a), leaves(b)
    missing = sorted(one.keys() ^ two.keys())
    near = (
        (lambda x, y: x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)))
        if not rel
        else same
    )
    return missing + [path for path in one if path in two and not near(one[path], two[path])]


def finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in leaves(value).values() if t.is_floating_point())


def memory(component: Any) -> str:
    """A digest of what a component remembers from call to call: of a function, its module's globals too."""
    function = getattr(component, "function", None)
    owners = [vars(component)]
    for each in [function] if function is not None else [type(component).forward]:
        cells = [c.cell_contents for c in getattr(each, "__closure__", None) or ()]
        owners += [
            {"defaults": getattr(each, "__kwdefaults__", None), "cells": cells},
            vars(each),
            vars(type(component)),
        ]
        owners.append(getattr(each, "__globals__", {}))
    digest = hashlib.sha256()
    for text in _texts(owners, 0, set()):
        digest.update(text.encode())
    return digest.hexdigest()


def _texts(value: Any, depth: int, seen: set[int]) -> Iterator[str]:
    if isinstance(value, bool | int | float | str | None):
        yield repr(value)
        return
    if depth > 4 or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        flat = value.detach().double().flatten()
        yield f"{tuple(value.shape)}{flat.dot(torch.linspace(1, 2, len(flat), dtype=flat.dtype)).item()}"
    elif isinstance(value, torch.Generator):
        yield str(hash(value.get_state().numpy().tobytes()))
    elif isinstance(value, np.random.Generator):
        yield repr(value.bit_generator.state)
    elif isinstance(value, nn.Module) and depth:
        yield from _texts(dict(value.state_dict()), depth + 1, seen)
    elif isinstance(value, Mapping):
        for key in [k for k in list(value) if not str(k).startswith("__")]:
            yield str(key)
            yield from _texts(value[key], depth + 1, seen)
    elif isinstance(value, list | tuple | set | deque):
        yield str(len(value))
        for each in value:
            yield from _texts(each, depth + 1, seen)
    elif " object at 0x" not in (text := repr(value)[:200]) and not isinstance(value, ModuleType | type):
        yield text  # an itertools.count shows where it is


def statistics_aside(module: Any) -> dict[str, Tensor]:
    """A module's state without the running statistics of batch norm, which torch itself moves in training."""
    norms = [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    skip = {
        f"{n}.{b}".strip(".") for n in norms for b in ("running_mean", "running_var", "num_batches_tracked")
    }
    return {
        k: v.detach().clone()
        for k, v in module.state_dict().items()
        if isinstance(v, Tensor) and k not in skip
    }
