"""Any per-token function of student and teacher logits, computed without ever holding the ``[N, V]`` logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .engine import ChunkedRows, Plan
from .fused import KERNELS
from .rows import Vocabulary, align_vocabularies, check_vocabularies
from .unembed import Unembed

Reduction = Literal["none", "sum", "mean"]
_CPU_ELEMENTS = {True: 2**24, False: 2**22}  # logits per chunk; autograd keeps about ten copies, a kernel none
_CUDA_ELEMENTS = {True: 2**26, False: 2**24}


@torch.compiler.disable  # chooses rows by their values: in a compiled caller this is a graph break, by design
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

    fn: maps ``[R, V]`` rows of each side to ``[R]``, each row on its own; a divergence of this package or any other.
        Divergences with a kernel (`fused.KERNELS`) are differentiated in closed form, others by autograd per chunk.
    student, teacher: hidden states of one leading shape; no teacher (``()``) and several are allowed.
        No gradient reaches a teacher.
    mask, weights: one per token. A token with mask false or weight 0 is not computed at all, so its hidden state may
        be NaN; its value is 0. `weights` multiply the values and may carry gradient.
    per_token: keyword arguments of `fn` that have one entry per token (``target``, a temperature each); tensors there
        and in `options` receive gradient where they ask for it.
    vocabulary: see `align_vocabularies`; different sizes are refused unless declared.
    chunk_size: tokens at a time; by default so many that a chunk's logits take 64 MiB (CPU) or 256 MiB (CUDA).
    reduction: ``none`` gives the leading shape, ``sum`` and ``mean`` (the sum over the sum of the weights) a scalar.

    The gradient is computed in the forward pass, as if the backward pass will bring one common factor for all tokens
    (a sum, a mean, a loss scale). It is computed anew, from the inputs, where backward brings anything else, or comes
    a second time. With ``create_graph=True`` the gradient is differentiable, and then needs the logits at once.
    """
    fn, options = _unwrap(fn, options)
    teachers = (teacher,) if isinstance(teacher, Unembed) else tuple(teacher)
    shape = student.hidden.shape[:-1]
    _check(student, teachers, shape, vocabulary)
    weight = _row_weights(mask, weights, shape, student.hidden)
    live = None if weight is None else weight.detach().nonzero().squeeze(-1)

    def rows(x: Tensor, trailing: int = 0) -> Tensor:
        flat = x.reshape(-1, *x.shape[x.ndim - trailing :])
        return flat if live is None else flat.index_select(0, live)

    extras = {name: rows(x, x.ndim - len(shape)) for name, x in (per_token or {}).items()}
    extras |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
    sides = (student, *(Unembed(*_detached(t)) for t in teachers))
    plan = Plan(
        fn=fn,
        options={name: x for name, x in options.items() if name not in extras},
        names=tuple(extras),
        per_token=frozenset(per_token or {}),
        heads=tuple((side.softcap, side.scale) for side in sides),
        entries=min(side.weight.shape[0] for side in sides) if vocabulary == "cut" else None,
        align=vocabulary,
        kernel=_kernel(fn, sides, extras, vocabulary),
        chunk=chunk_size,
        grad=torch.is_grad_enabled(),
    )
    tensors = [x for side in sides for x in (rows(side.hidden, 1), side.weight, side.bias)]
    kept = None if weight is None or live is None else weight.index_select(0, live)
    values: Tensor = ChunkedRows.apply(plan, None if kept is None else kept.detach(), *tensors, *extras.values())
    return _reduce(values, kept, live, shape, reduction)
