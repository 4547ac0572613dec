"""The loop over chunks, and the autograd node around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import Kernel
from .rows import Vocabulary, align_vocabularies, at_least_float32
from .unembed import Unembed, cap_and_scale

Grads = list[Tensor | None]


@dataclass(frozen=True)
class Plan:
    """What stays the same for all chunks.

    Tensors come as one flat tuple, for autograd: hidden ``[N, H]``, weight ``[V, H]`` and bias (or None) of the
    student, the same of each teacher, then the extra arguments of `fn` called `names`.
    """

    fn: Callable[..., Tensor]
    kernel: Kernel | None
    options: Mapping[str, Any]
    names: tuple[str, ...]
    per_token: frozenset[str]
    heads: tuple[tuple[float | None, float], ...]  # softcap and scale of each side
    dtypes: tuple[torch.dtype, ...]  # of each side's matrix product
    vocabulary: Vocabulary
    chunk_size: int
    tile_size: int
    grad: bool

    def sides(self, tensors: Sequence[Tensor]) -> list[Unembed]:
        """The sides in the dtypes of their products, cut to the entries of the vocabulary that count."""
        kept = min(len(w) for w in tensors[1 : 3 * len(self.heads) : 3]) if self.vocabulary == "cut" else None
        cast = [
            (hidden.to(dtype), weight[:kept].to(dtype), bias if bias is None else bias[:kept].to(dtype))
            for hidden, weight, bias, dtype in zip(*(tensors[i::3] for i in range(3)), self.dtypes, strict=False)
        ]
        return [Unembed(*side, *head) for side, head in zip(cast, self.heads, strict=True)]

    def extras(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, tensors[3 * len(self.heads) :], strict=True))

    def slice(self, extras: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        return {name: x[rows] if name in self.per_token else x for name, x in extras.items()}

    def call(self, raw: Sequence[Tensor], extras: Mapping[str, Tensor]) -> Tensor:
        """`fn` on rows of the linear layers' outputs: ``[R]``, float32 or wider."""
        logits = [cap_and_scale(x, *head) for x, head in zip(raw, self.heads, strict=True)]
        value = self.fn(*align_vocabularies(*logits, how=self.vocabulary), **self.options, **extras)
        if value.shape != raw[0].shape[:1]:
            raise ValueError(f"fn must return one value per row, [{len(raw[0])}], given {tuple(value.shape)}")
        return at_least_float32(value)


class ChunkedRows(torch.autograd.Function):
    """Values ``[N]``; forward prepares the gradient for an upstream one proportional to `guess` ``[N]``."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, guess: Tensor, *tensors: Tensor) -> Tensor:
        needs = [need and plan.grad for need in ctx.needs_input_grad[2:]]
        values, ctx.grads = _run(plan, tensors, guess, needs)
        ctx.plan, ctx.guess = plan, guess
        ctx.save_for_backward(*tensors)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needs, tensors = ctx.needs_input_grad[2:], ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, None, *_differentiable(ctx.plan, tensors, upstream, needs))
        # Given away, not copied: they may become the parameters' .grad, so a second pass cannot use them.
        grads, ctx.grads = ctx.grads, None
        factor = None if grads is None else _common_factor(upstream, ctx.guess)
        if factor is None:
            _, grads = _run(ctx.plan, tensors, upstream, needs)
        else:
            grads = [g if g is None else g.mul_(factor) for g in grads]
        return (None, None, *(g if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)))


def _run(plan: Plan, tensors: Sequence[Tensor], upstream: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Grads]:
    """Values ``[N]``, and the gradient of sum(upstream * values) for the tensors that need one, float32 or wider."""
    with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
        sides, extras = plan.sides(tensors), plan.extras(tensors)
        wide = [torch.promote_types(x.dtype, torch.float32) if need else None for x, need in zip(tensors, needs)]
        grads: Grads = [x and torch.zeros_like(t, dtype=x) for t, x in zip(tensors, wide)]
        values = torch.empty_like(upstream)
        buffers = [side.hidden.new_empty(plan.chunk_size, len(side.weight)) for side in sides]
        for start in range(0, len(values), plan.chunk_size):
            rows = slice(start, start + plan.chunk_size)
            raw = [_linear(side, rows, buffer) for side, buffer in zip(sides, buffers, strict=True)]
            step = _by_autograd if plan.kernel is None else _by_kernel
            values[rows], slope = step(plan, raw, upstream[rows], plan.slice(extras, rows), rows, grads)
            _add_student(slope, sides[0], rows, grads)
    return values, grads


def _linear(side: Unembed, rows: slice, buffer: Tensor) -> Tensor:
    hidden = side.hidden[rows]
    out = buffer[: len(hidden)]
    if side.bias is None:
        return torch.mm(hidden, side.weight.t(), out=out)
    return torch.addmm(side.bias, hidden, side.weight.t(), out=out)


def _by_kernel(...): ...
