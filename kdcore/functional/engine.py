"""The loop over chunks, and the autograd node around it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import Kernel
from .rows import Unembed, Vocabulary, align_vocabularies, cap_and_scale, check, column, wider

Grads = list[Tensor | None]


@dataclass(frozen=True)
class Plan:
    """What to compute: `fn`, or its kernel, of all `sides` (the student's first) and the extra tensors."""

    fn: Callable[..., Tensor]
    kernel: Kernel | None
    options: Mapping[str, Any]
    sides: Sequence[Unembed]
    dtypes: Sequence[torch.dtype]  # of each side's matrix product
    entries: int | None  # leading entries of the vocabulary to compare; None for all
    extras: Mapping[str, Tensor]
    per_token: frozenset[str]
    vocabulary: Vocabulary
    chunk_size: int
    tile_size: int
    grad: bool

    def inputs(self) -> list[Tensor | None]:
        """What may get gradient: the student's hidden states, weight and bias, then the extra tensors."""
        return [*self.sides[0][:3], *self.extras.values()]

    def cast(self) -> list[Unembed]:
        """The sides in the dtypes of their products, with the entries that count."""
        n = self.entries
        return [
            Unembed(h.to(dtype), w[:n].to(dtype), b if b is None else b[:n].to(dtype), cap, scale)
            for (h, w, b, cap, scale), dtype in zip(self.sides, self.dtypes, strict=True)
        ]

    def slice(self, extras: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        return {name: x[rows] if name in self.per_token else x for name, x in extras.items()}

    def call(self, raw: Sequence[Tensor], extras: Mapping[str, Tensor]) -> Tensor:
        """`fn` on rows of the linear layers' outputs: ``[R]``, float32 or wider."""
        logits = [cap_and_scale(x, *side[3:]) for x, side in zip(raw, self.sides, strict=True)]
        value = self.fn(*align_vocabularies(*logits, how=self.vocabulary), **self.options, **extras)
        check(value.shape == raw[0].shape[:1], f"fn must return [R], one per row; given {tuple(value.shape)}")
        return value.to(wider(raw[0].dtype))


class ChunkedRows(torch.autograd.Function):
    """Values ``[N]``; forward prepares the gradient for an upstream one proportional to `guess` ``[N]``."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, guess: Tensor, *inputs: Tensor) -> Tensor:
        values, ctx.grads = _run(plan, guess, [plan.grad and need for need in ctx.needs_input_grad[2:]])
        ctx.plan, ctx.guess = plan, guess
        ctx.save_for_backward(*inputs)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        plan, needs, inputs = ctx.plan, ctx.needs_input_grad[2:], ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, None, *_differentiable(plan, upstream, needs))
        # Given away, not copied: they may become the parameters' .grad, so a second pass cannot use them.
        grads, ctx.grads = ctx.grads, None
        factor = _common_factor(upstream, ctx.guess) if grads and len(upstream) else None
        if factor is None:
            _, grads = _run(plan, upstream, needs)
        else:
            grads = [g if g is None else g.mul_(factor) for g in grads]
        own = [g if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        return (None, None, *own)


def _run(plan: Plan, upstream: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Grads]:
    """Values ``[N]``, and the gradient of sum(upstream * values), float32 or wider, where one is needed."""
    with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
        sides = plan.cast()
        wanted = (x if need else None for x, need in zip(plan.inputs(), needs, strict=True))
        grads = [x if x is None else x.new_zeros(x.shape, dtype=wider(x.dtype)) for x in wanted]
        totals = {name: x for name, x in zip(plan.extras, grads[3:], strict=True) if x is not None}
        values = torch.empty_like(upstream)
        buffers = [side.hidden.new_empty(plan.chunk_size, len(side.weight)) for side in sides]
        compute = _by_autograd if plan.kernel is None else _by_kernel
        for start in range(0, len(values), plan.chunk_size):
            rows = slice(start, start + plan.chunk_size)
            raw = [_linear(side, rows, buffer) for side, buffer in zip(sides, buffers, strict=True)]
            here = plan.slice(plan.extras, rows), plan.slice(totals, rows)
            values[rows], slope = compute(plan, raw, upstream[rows], *here)
            _add_student(slope, sides[0], rows, grads)
    return values, grads


def _linear(side: Unembed, rows: slice, buffer: Tensor) -> Tensor:
    hidden, bias = side.hidden[rows], buffer.new_zeros(1) if side.bias is None else side.bias
    return torch.addmm(bias, hidden, side.weight.t(), beta=side.bias is not None, out=buffer[: len(hidden)])


def _add_student(slope: Tensor, student: Unembed, rows: slice, grads: Grads) -> None:
    """Add what `slope`, the gradient at the linear layer's output, means for its three inputs."""
    hidden, weight, bias = grads[0], *(x if x is None else x[: len(student.weight)] for x in grads[1:3])
    if hidden is not None:
        hidden[rows] = slope @ student.weight
    if weight is not None and weight.dtype == slope.dtype:
        weight.addmm_(slope.t(), student.hidden[rows])
    elif weight is not None:
        weight.add_(slope.t() @ student.hidden[rows])
    if bias is not None:
        bias.add_(slope.sum(0, dtype=bias.dtype))


def _by_autograd(
    plan: Plan, raw: list[Tensor], upstream: Tensor, extras: dict[str, Tensor], totals: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Values of a chunk and the gradient at raw[0]; adds the gradient of the extra tensors to `totals`."""
    if not plan.grad:
        return plan.call(raw, extras), raw[0]
    leaves = [x.detach().requires_grad_() for x in (raw[0], *(extras[name] for name in totals))]
    with torch.enable_grad():
        value = plan.call([leaves[0], *raw[1:]], extras | dict(zip(totals, leaves[1:], strict=True)))
        found = torch.autograd.grad(value, leaves, upstream, allow_unused=True, materialize_grads=True)
    for total, part in zip(totals.values(), found[1:], strict=True):
        total.add_(part)
    return value.detach(), found[0]


def _by_kernel(
    plan: Plan, raw: list[Tensor], upstream: Tensor, extras: dict[str, Tensor], totals: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The same tile by tile; the gradient takes the place of raw[0]."""
    values, scale = torch.empty_like(upstream), plan.sides[0].scale
    for start in range(0, len(upstream), plan.tile_size):
        tile = slice(start, start + plan.tile_size)
        options = {**plan.options, **plan.slice(extras, tile)}
        tau = torch.as_tensor(options.pop("temperature"), dtype=upstream.dtype, device=upstream.device)
        squared = tau**2 if options.pop("t_squared") else torch.ones_like(tau)
        zs, zt = (x[tile].to(wider(x.dtype)) for x in raw)
        slope = _cap_and_scale_(zs, *plan.sides[0][3:], tau)
        _cap_and_scale_(zt, *plan.sides[1][3:], tau)
        values[tile] = plan.kernel(zs, zt, **options) * squared  # type: ignore[misc]
        zs.mul_((upstream[tile] * (scale * squared / tau)).unsqueeze(-1))
        if slope is not None:
            zs.mul_(slope)
        if zs.dtype != raw[0].dtype:  # else zs is the tile of raw[0] itself
            raw[0][tile] = zs
    return values, raw[0]


def _cap_and_scale_(z: Tensor, softcap: float | None, scale: float, tau: Tensor) -> Tensor | None:
    """`cap_and_scale`, then the temperature, in place; returns the slope of the cap."""
    if softcap is None:
        z.mul_(scale / column(tau))
        return None
    slope = 1 - z.mul_(scale / softcap).tanh_().square()
    z.mul_(softcap / column(tau))
    return slope


def _common_factor(upstream: Tensor, guess: Tensor) -> Tensor | None:
    """The c of upstream = c * guess, to rounding; None where there is none."""
    pivot = guess.abs().argmax()
    factor = upstream[pivot] / guess[pivot]
    near = (upstream - factor * guess).abs() <= 4 * torch.finfo(guess.dtype).eps * upstream.abs()
    return factor if bool(near.all()) else None


def _differentiable(plan: Plan, upstream: Tensor, needs: Sequence[bool]) -> Grads:
    """The same gradients as a graph, for second derivatives; holds all logits."""
    with torch.autocast(upstream.device.type, enabled=False):
        value = plan.call([F.linear(*side[:3]) for side in plan.cast()], plan.extras)
    wanted = [x for x, need in zip(plan.inputs(), needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(value, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
