"""Any per-token function of student and teacher logits, without ever holding the ``[N, V]`` logits."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .engine import ChunkedRows, Plan
from .fused import KERNELS, Kernel
from .rows import Selection, Unembed, Vocabulary, align_vocabularies, check, wider

Fn = TypeVar("Fn", bound=Callable[..., Any])


def _graph_break(fn: Fn) -> Fn:
    """Rows are picked by their values, so a compiled caller leaves its graph here, by design."""
    return cast(Fn, torch.compiler.disable(fn))


@_graph_break
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
    **options: Any,
) -> Tensor:
    """``fn(student_logits, *teacher_logits, **options)`` of every token, ``[...]`` for hidden ``[..., H]``.

    fn: from rows ``[R, V]`` of each side to ``[R]``, each row on its own, in torch operators. Those in
        `KERNELS` are differentiated in closed form, others by autograd within the chunk.
    student, teacher: hidden states of one leading shape; any number of teachers, none gets a gradient.
    mask, weights: one per token. With mask false or weight 0 the value is 0 and nothing is computed, so NaN
        is harmless there. `weights` multiply the values and may carry gradient.
    per_token: keyword arguments of `fn` with one entry per token (a target, a temperature each). These, and
        tensors in `options`, get gradient where they ask for it.
    vocabulary: see `align_vocabularies`. chunk_size: tokens at a time; by default as many as give 64 MiB of
        float32 logits per side (256 MiB off the CPU), a quarter of it for functions without a kernel.

    The gradient is made in the forward pass, for a backward pass that brings one factor for all tokens (sum,
    mean, loss scale); anything else, or a second backward pass, computes it anew. Under ``create_graph=True``
    it is differentiable, and then holds all logits.
    """
    # A tuple of tensors, such as the core's own unembed, is one teacher; a sequence of those is several.
    teachers = [teacher] if len(teacher) and isinstance(teacher[0], Tensor) else teacher
    sides = [Unembed(*student), *(_detached(*side) for side in cast(Sequence[Unembed], teachers))]
    selection = Selection(sides[0].hidden.shape[:-1], mask, weights)
    sides = [side._replace(hidden=selection.take(side.hidden)) for side in sides]
    if vocabulary != "sort":
        align_vocabularies(*(side.weight.t() for side in sides), how=vocabulary)
    extras = {name: selection.take(x) for name, x in (per_token or {}).items()}
    fn, options = _resolve(fn, options, extras, sides[0].hidden.new_empty(0, 2))
    extras |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
    kernel = _kernel(fn, sides, extras) if vocabulary != "sort" else None
    plan = Plan(
        fn=fn,
        kernel=kernel,
        options={name: x for name, x in options.items() if name not in extras},
        sides=sides,
        dtypes=[_matmul_dtype(side) for side in sides],
        entries=min(len(side.weight) for side in sides) if vocabulary == "cut" else None,
        extras=extras,
        per_token=frozenset(per_token or ()),
        vocabulary=vocabulary,
        grad=torch.is_grad_enabled(),
        **_sizes(sides, kernel is not None, chunk_size),
    )
    guess = torch.ones_like(sides[0].hidden[:, 0], dtype=wider(plan.dtypes[0]))
    if selection.weight is not None:
        guess *= selection.weight.detach()
    return selection.put(cast(Tensor, ChunkedRows.apply(plan, guess, *plan.inputs())))


def _detached(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *head: Any) -> Unembed:
    return Unembed(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), *head)


def _resolve(
    fn: Callable[..., Tensor], options: dict[str, Any], per_token: Mapping[str, Tensor], nothing: Tensor
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """`fn` out of its partial; where it has a kernel, all its options, which it checks itself, on no rows."""
    while isinstance(fn, functools.partial) and not fn.args:
        options, fn = {**fn.keywords, **options}, fn.func
    if fn in KERNELS:
        bound = inspect.signature(fn).bind(None, None, **options, **per_token)
        bound.apply_defaults()
        options = {name: x for name, x in bound.kwargs.items() if name not in per_token}
        fn(nothing, nothing, **options, **{name: x[:0] for name, x in per_token.items()})
    return fn, options


def _kernel(fn: Callable[..., Any], sides: list[Unembed], extras: Mapping[str, Tensor]) -> Kernel | None:
    """The closed form of `fn` where it holds: one teacher, finite logits, gradient for the student alone."""
    asked = torch.is_grad_enabled() and any(x.requires_grad for x in extras.values())
    finite = all(side.bias is None or bool(side.bias.isfinite().all()) for side in sides)
    return KERNELS.get(fn) if len(sides) == 2 and finite and not asked else None


def _matmul_dtype(side: Unembed) -> torch.dtype:
    """What F.linear would compute in here, autocast included."""
    own, device = torch.promote_types(side.hidden.dtype, side.weight.dtype), side.hidden.device.type
    autocast = torch.is_autocast_enabled(device) and own != torch.float64
    return torch.get_autocast_dtype(device) if autocast else own


def _sizes(sides: Sequence[Unembed], has_kernel: bool, chunk_size: int | None) -> dict[str, int]:
    """Rows per chunk, in equal shares, and per tile."""
    (count, _), on_cpu = sides[0].hidden.shape, sides[0].hidden.device.type == "cpu"
    entries = max(len(side.weight) for side in sides)
    if chunk_size is None:
        most = max((2**24 if on_cpu else 2**26) // (1 if has_kernel else 4) // entries, 1)
        chunk_size = max(-(-count // max(-(-count // most), 1)), 1)
    check(chunk_size >= 1, f"chunk_size must be at least 1, given {chunk_size}")
    # The few buffers of a tile should fit the caches of the cores at work; a GPU rather wants few launches.
    tile = 2**18 * torch.get_num_threads() if on_cpu else 2**25
    return {"chunk_size": chunk_size, "tile_size": max(tile // entries, 1)}
