"""Several processes: sums and rows over ranks. With one process every function here is the identity."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdcore.errors import InputError, RunError, cause

_BROKEN = re.compile(r"gloo|NCCL|Connection (reset|closed|refused)|Broken pipe|Socket Timeout", re.IGNORECASE)


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


def agree(value: int) -> bool:
    """Whether all ranks hold the same 63-bit number."""
    return len(set(gather(torch.tensor([value])).tolist())) == 1


def average_gradients(params: Iterable[nn.Parameter], *, mean: bool = True) -> None:
    """Sum (or average) ``.grad`` over ranks, in place, in one message a dtype.

    A parameter that no rank has a gradient for keeps None, as with one process: the optimiser passes it over.
    """
    if world() == 1:
        return
    owners = [p for p in params if p.requires_grad]
    for dtype in dict.fromkeys(p.dtype for p in owners):
        mine = [p for p in owners if p.dtype == dtype]
        used = torch.tensor([p.grad is not None for p in mine]).to(mine[0])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in mine]
        flat = torch.cat([*(g.flatten() for g in grads), used])
        dist.all_reduce(flat)
        *pieces, used = flat.split([*(g.numel() for g in grads), len(mine)])
        for param, grad, piece, anywhere in zip(mine, grads, pieces, used.tolist(), strict=True):
            param.grad = grad.copy_(piece.view_as(grad) / (world() if mean else 1)) if anywhere else None


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


def refuse_batch_statistics(student: nn.Module) -> None:
    """Raise InputError where batch norm in training would see one process's share of a batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for name, module in student.named_modules():
        counts = isinstance(module, _BatchNorm) and module.track_running_stats
        if counts and not isinstance(module, nn.SyncBatchNorm):
            problem = f"{name!r} has batch statistics: over {world()} processes each would see its own share"
            hint = 'use group norm (args.norm = "group" in kdcore.zoo), SyncBatchNorm on GPUs, or one process'
            raise InputError("student", problem, hint=hint)


def make_folder(folder: Path) -> None:
    """Made by the first process alone: another would bring back a folder that the first has just discarded."""
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)


def barrier() -> None:
    if world() > 1:
        dist.barrier()


@contextmanager
def group() -> Iterator[None]:
    """The process group that torchrun describes in the environment, for this block; nothing without it.

    It is left in step: a rank whose peer is gone already would be aborted by the background threads of gloo.
    Where a peer is gone before that, the block ends with a RunError: the libraries below tell of sockets.
    """
    mine = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if mine and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if mine:  # numbers are summed on the CPU, tensors where they are
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        if mine:
            dist.barrier()
    except RuntimeError as error:
        if world() == 1 or not (isinstance(error, dist.DistError) or _BROKEN.search(str(error))):
            raise
        gone = f"another process of this run is gone, so this one ({rank()} of {world()}) ends too"
        hint = "what it said is above, if it could; the last saved state is kept: kd resume, or --resume"
        raise RunError(f"{gone}: {cause(error, 100)}\n  hint    {hint}") from error
    finally:
        if mine:
            dist.destroy_process_group()
