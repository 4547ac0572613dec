"""What augmentations promise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.testing.findings import BASICS, Failed, Skipped, check
from kdcore.testing.subjects import Subject
from kdcore.testing.tensors import copied, differing, leaves
from kdcore.types import Batch

LABELS = ("id", "target", "targets", "label", "labels", "y", "mask")


@check("augmentation")
def batch_kept(s: Subject) -> None:
    """Models and losses read the batch by key. Do: return a Batch with every key, each with its shape and type."""
    batch, new = _augmented(s)
    if not isinstance(new, Batch):
        raise Failed(f"returned {type(new).__name__}")
    old, found = leaves(batch), leaves(new)
    free = ("target",) if s.fresh().changes_labels else ()
    for name, value in old.items():
        if name not in found:
            raise Failed(f"{name!r} is gone")
        got = found[name]
        if name.rpartition("/")[2] not in free and (got.shape != value.shape or got.dtype != value.dtype):
            raise Failed(
                f"{name!r} was {tuple(value.shape)} {value.dtype}, and is {tuple(got.shape)} {got.dtype}"
            )


@check("augmentation", after=(*BASICS, "batch_kept"))
def labels_kept(s: Subject) -> None:
    """Labels or ids that change unsaid spoil metrics, caches and the task loss. Do: leave target and id alone, or
    declare changes_labels = True."""
    if s.fresh().changes_labels:
        raise Skipped("declares changes_labels")
    if names := [p for p in _changed(s) if p.rpartition("/")[2] in LABELS]:
        raise Failed(f"it changed {', '.join(names)}")


@check("augmentation", after=(*BASICS, "batch_kept"))
def inputs_as_declared(s: Subject) -> None:
    """A cached teacher answers for inputs as they were. Do: declare changes_inputs = True."""
    if s.fresh().changes_inputs:
        raise Skipped("declares changes_inputs")
    if names := _changed(s):
        raise Failed(f"declares changes_inputs = False, and changed {', '.join(names)}")


@check("augmentation")
def draw(s: Subject) -> None:
    """The next epoch's samples are indices of the data set. Do: return int64 indices within range, equal at every call
    for one epoch."""
    order = s.home.run.order
    size = order.sizes[order.epoch_stream]
    found = [s.fresh().draw(size, epoch) for epoch in (0, 0, 1)]
    if found[0] is None:
        return
    for each in found:
        if not isinstance(each, Tensor) or each.dtype != torch.int64 or each.dim() != 1 or not len(each):
            raise Failed(f"draw gave {getattr(each, 'dtype', type(each).__name__)}, not int64 indices")
        if int(each.min()) < 0 or int(each.max()) >= size:
            raise Failed(f"indices from {int(each.min())} to {int(each.max())} of {size} samples")
    if not torch.equal(found[0], found[1]):
        raise Failed("two calls for one epoch differ")


def _augmented(s: Subject) -> tuple[Batch, Any]:
    batch = s.calls[0].args["batch"]
    return batch, s.fresh().eval()(copied(batch))


def _changed(s: Subject) -> list[str]:
    """The keys that differ after it in any of some steps: what is drawn may spare a small batch once."""
    found: dict[str, None] = {}
    for s.home.run.step in range(8):
        batch, new = _augmented(s)
        found |= dict.fromkeys(p for p in differing(batch, new, rel=0) if p in leaves(batch))
    s.home.run.step = 0
    return list(found)
