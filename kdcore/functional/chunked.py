"""Any per-token function of student and teacher logits, computed without ever holding the ``[N, V]`` logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import ChunkedRows, Plan
from .fused import KERNELS, Kernel
from .rows import Vocabulary, align_vocabularies, at_least_float32, check_temperature, check_vocabularies
from .selection import Reduction, Selection
from .unembed import Unembed


@torch.compiler.disable  # picks rows by their values: inside a compiled caller this is a graph break, by design
def chunked(
    fn: Callable[..., Tensor],
    student: Unembed,
    teacher: Unembed | Sequence[Unembed],
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    per_token: Mapping[str, Tensor] | None = None,
    vocabulary: Vocabulary = "same",
    chunk_size: int | None = None,
    reduction: Reduction = "none",
    **options: Any,
) -> Tensor:
    """``fn(student_logits, *teacher_logits, **options)`` for every token, from hidden states and output weights.

    fn: from ``[R, V]`` rows of each side to ``[R]``, every row on its own; any function in torch operators. Those in
        `fused.KERNELS` are differentiated in closed form, others by autograd inside the chunk.
    student, teacher: hidden states of one leading shape; several teachers, or none (``()``), are allowed. No
        gradient reaches a teacher.
    mask, weights: one per token. A token with mask false or weight 0 is not computed (its hidden state may be NaN);
        its value is 0. `weights` multiply the values and may carry gradient.
    per_token: keyword arguments of `fn` with one entry per token (``target``, a temperature each). Tensors here and
        in `options` get gradient where they ask for it.
    vocabulary: see `align_vocabularies`; different sizes are refused unless declared.
    chunk_size: tokens at a time; the default holds 64 MiB of float32 logits per side (256 MiB off the CPU), and a
        quarter of that for functions without a kernel.
    reduction: ``none`` gives the leading shape; ``sum``, or ``mean`` over the sum of the weights, a scalar.

    The gradient is made in the forward pass, for a backward pass that brings one common factor for all tokens (a sum,
    a mean, a loss scale). Anything else, or a second backward pass, is computed anew from the inputs. With
    ``create_graph=True`` the gradient is differentiable and holds all logits.
    """
    teachers = (teacher,) if isinstance(teacher, Unembed) else tuple(teacher)
    sides = (student, *map(_detached, teachers))
    selection = Selection(student.hidden.shape[:-1], mask, weights)
    if vocabulary == "same":
        check_vocabularies(*(len(side.weight) for side in sides))
    fn, options = _resolve(fn, options, per_token or {})
    extras = {name: selection.take(x) for name, x in (per_token or {}).items()}
    extras |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
    tensors = [x for side in sides for x in (selection.take(side.hidden), side.weight, side.bias)]
    count = len(tensors[0])  # type: ignore[arg-type]
    kernel = _kernel(fn, sides, extras, vocabulary)
    plan = Plan(
        fn=fn,
        kernel=kernel,
        options={name: x for name, x in options.items() if name not in extras},
        names=tuple(extras),
        per_token=frozenset(per_token or {}),
        heads=tuple((side.softcap, side.scale) for side in sides),
        dtypes=tuple(map(_matmul_dtype, sides)),
        vocabulary=vocabulary,
        grad=torch.is_grad_enabled(),
        **_sizes(count, sides, kernel is not None, chunk_size),
    )
    guess = selection.weight
    if guess is None:
        guess = at_least_float32(student.hidden.new_ones(count, dtype=plan.dtypes[0]))
    values: Tensor = ChunkedRows.apply(plan, guess.detach(), *tensors, *extras.values())
    return selection.reduce(values, reduction)


def dense(
    fn: Callable[..., Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    per_token: Mapping[str, Tensor] | None = None,
    vocabulary: Vocabulary = "same",
    reduction: Reduction = "none",
    **options: Any,
) -> Tensor:
    """What `chunked` computes, from logits ``[..., V]`` that exist already."""
    teachers = (teacher_logits,) if isinstance(teacher_logits, Tensor) else tuple(teacher_logits)
    selection = Selection(student_logits.shape[:-1], mask, weights)
    rows = (selection.take(x) for x in (student_logits, *(x.detach() for x in teachers)))
    extras = {name: selection.take(x) for name, x in (per_token or {}).items()}
    values = fn(*align_vocabularies(*rows, how=vocabulary), **options, **extras)
    return selection.reduce(values, reduction)


def _detached(side: Unembed) -> Unembed:
    bias = None if side.bias is None else side.bias.detach()
    return side._replace(hidden=side.hidden.detach(), weight=side.weight.detach(), bias=bias)


def _resolve(
    fn: Callable[..., Tensor], options: dict[str, Any], per_token: Mapping[str, Tensor]
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """`fn` without functools.partial around it; for a function with a kernel, all its options, checked."""
    while isinstance(fn, functools.partial) and not fn.args:
        fn, options = fn.func, {**fn.keywords, **options}
    if fn in KERNELS:
        bound = inspect.signature(fn).bind(None, None, **options, **per_token)
        bound.apply_defaults()
        options = {name: x for name, x in bound.kwargs.items() if name not in per_token}
        check_temperature(options.get("temperature", 1.0))
    return fn, options


def _kernel(
    fn: Callable[..., Tensor], sides: Sequence[Unembed], extras: Mapping[str, Tensor], vocabulary: Vocabulary
) -> Kernel | None:
    """The closed form of `fn`, where it holds: no gradient but the student's, and every logit finite."""
    if fn not in KERNELS or len(sides) != 2 or vocabulary == "sort":
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in extras.values()):
        return None
    finite = all(side.bias is None or bool(side.bias.isfinite().all()) for side in sides)
    return KERNELS[fn] if finite else None


def _matmul_dtype(side: Unembed) -> torch.dtype:
    """The dtype that F.linear would compute in here, autocast included."""
    own = torch.promote_types(side.hidden.dtype, side.weight.dtype)
    device = side.hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and own != torch.float64 else own


def _sizes(count: int, sides: Sequence[Unembed], has_kernel: bool, chunk_size: int | None) -> dict[str, int]:
    """Rows per chunk and per tile, in equal shares."""
    entries, on_cpu = max(len(side.weight) for side in sides), sides[0].hidden.device.type == "cpu"
    if chunk_size is None:
        budget = 2**24 if on_cpu else 2**26
        most = max(budget // (1 if has_kernel else 4) // entries, 1)
        chunk_size = -(-count // max(-(-count // most), 1))
    elif chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, given {chunk_size}")
    # A tile's few buffers should fit the cache of one core; a GPU rather wants few launches.
    return {"chunk_size": max(chunk_size, 1), "tile_size": max((2**18 if on_cpu else 2**25) // entries, 1)}
