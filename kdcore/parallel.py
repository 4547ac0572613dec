"""Several processes: sums over ranks. With one process every function here is the identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def total(value: float | Tensor, device: torch.device | str = "cpu") -> float:
    """The sum of a number over all ranks."""
    if world() == 1:
        return float(value)
    tensor = torch.as_tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def average_gradients(params: Iterable[nn.Parameter], *, mean: bool = True) -> None:
    """Sum (or average) ``.grad`` over ranks, in place, in one message a dtype."""
    if world() == 1:
        return
    owners = [p for p in params if p.requires_grad]
    for param in owners:  # a rank whose samples left a parameter unused still takes part
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    for dtype in {p.dtype for p in owners}:
        grads = [p.grad for p in owners if p.dtype == dtype and p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        if mean:
            flat /= world()
        for grad, piece in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(piece.view_as(grad))


class _Gather(torch.autograd.Function):
    """Concatenate along the first axis over ranks; the gradient of each rank's rows comes back summed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        sizes = torch.zeros(world(), dtype=torch.int64, device=value.device)
        sizes[rank()] = len(value)
        dist.all_reduce(sizes)
        counts = sizes.tolist()
        padded = value.new_zeros(max(counts), *value.shape[1:])
        padded[: len(value)] = value
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        ctx.start, ctx.length = sum(counts[: rank()]), len(value)
        return torch.cat([piece[:n] for piece, n in zip(pieces, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may hold the original elsewhere
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.length]


def gather(value: Tensor) -> Tensor:
    """All ranks' rows, in rank order, differentiably."""
    return value if world() == 1 else _Gather.apply(value)


def barrier() -> None:
    if world() > 1:
        dist.barrier()


@contextmanager
def group() -> Iterator[None]:
    """The process group that torchrun describes in the environment, for this block; nothing without it.

    It is left in step: a rank whose peer is gone already would be aborted by the background threads of gloo.
    """
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
