"""The peak of memory during a training: of the GPU where it ran there, else of the whole process."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch


def reset_peak() -> None:
    """Start measuring anew. Only Linux can for a process; elsewhere its peak is that of all its runs."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak() -> int | None:
    """Bytes since ``reset_peak``, or None where the system does not say."""
    if torch.cuda.is_initialized() and (used := torch.cuda.max_memory_allocated()):
        return int(used)
    with suppress(OSError, StopIteration):
        rows = Path("/proc/self/status").read_text("ascii").splitlines()
        return int(next(r for r in rows if r.startswith("VmHWM")).split()[1]) * 1024
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None
