"""Trees of tensors, as components are given and give them: change, compare, differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from kdcore.types import Batch, Outputs

T = TypeVar("T")
Change = Callable[[str, Tensor], Tensor]
NATIVE = tuple(f.name for f in fields(Outputs) if f.name not in ("tensors", "rows"))
"""The names of a model's outputs that need no tap."""


def mapped(value: T, change: Change) -> T:
    """``value`` with every tensor replaced; paths are like ``student/logits`` or ``batch/target``."""
    return cast(T, _mapped(value, change, ""))


def _mapped(value: Any, change: Change, path: str) -> Any:

    def inside(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        return {k: _mapped(v, change, f"{path}/{k}") for k, v in items}

    if isinstance(value, Tensor):
        return change(path.strip("/"), value)
    if isinstance(value, Outputs):  # a tap is student/NAME
        native = inside((name, getattr(value, name)) for name in NATIVE)
        return replace(value, **native, tensors=inside(value.tensors.items()))
    if isinstance(value, Batch):
        return Batch(inside(value.items()), inside(value.parts.items()))
    if isinstance(value, Mapping):
        return inside(value.items())
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # Unembed, TopK
        return type(value)(**inside(value._asdict().items()))
    if isinstance(value, list | tuple):
        return type(value)(inside(enumerate(value)).values())
    return value


def leaves(value: Any) -> dict[str, Tensor]:
    """Every tensor by its path."""
    found: dict[str, Tensor] = {}
    mapped(value, lambda path, tensor: found.setdefault(path, tensor))
    return found


def copied(value: T) -> T:
    return mapped(value, lambda _, tensor: tensor.detach().clone())


def noise_where(hidden: Tensor) -> Change:
    """Other floating values at these positions (bool [B,L]), and others for the teacher than for the student."""

    def change(path: str, tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != hidden.shape or not tensor.is_floating_point():
            return tensor
        end = -9 if path.startswith("teacher") else 9
        noise = torch.linspace(-end, end, tensor.numel(), dtype=tensor.dtype).view_as(tensor)
        return torch.where(hidden.view(*hidden.shape, *[1] * (tensor.dim() - 2)), noise, tensor)

    return change


def gradients(total: Tensor, at: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradient of a scalar at each tensor; None where nothing arrives."""
    if not at or not total.requires_grad:
        return dict.fromkeys(at)
    return dict(zip(at, torch.autograd.grad(total, list(at.values()), allow_unused=True), strict=True))


def same(a: Tensor, b: Tensor, rel: float = 1e-4, floor: float = 1e-6) -> bool:
    """Equal shapes, and values that differ by less than ``rel`` of the larger tensor's size; for 0, the same bits."""
    if a.shape != b.shape or not rel:
        return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    a, b = a.detach().double(), b.detach().double()
    scale = max(float(a.abs().max()), float(b.abs().max())) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=rel * scale + floor, equal_nan=True)


def differing(a: Any, b: Any, rel: float = 1e-4) -> list[str]:
    """The paths at which two trees differ, as ``same`` judges."""
    one, two = leaves(a), leaves(b)
    shared = [path for path in one if path in two]
    return sorted(one.keys() ^ two.keys()) + [path for path in shared if not same(one[path], two[path], rel)]


def finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in leaves(value).values() if t.is_floating_point())
