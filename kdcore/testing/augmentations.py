"""What augmentations promise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.testing.findings import BASICS, check, fail_if, skip_if
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import copied, differing, leaves
from kdcore.types import Batch

LABELS = ("id", "target", "targets", "label", "labels", "y", "mask")


@check("augmentation")
def batch_kept(s: Subject, call: Call) -> None:
    """Models and losses read the batch by key. Do: return a Batch with every key, each with its shape and type."""
    new = _augmented(s, call)
    fail_if(not isinstance(new, Batch), f"returned {type(new).__name__}")
    was, now = (
        {p: (tuple(t.shape), t.dtype) for p, t in leaves(b).items()} for b in (call.args["batch"], new)
    )
    gone = [path for path in was if path not in now]
    fail_if(gone, f"{', '.join(gone)} is gone")
    free = ("target",) if s.fresh().changes_labels else ()
    wrong = [path for path in was if now[path] != was[path] and path.rpartition("/")[2] not in free]
    fail_if(wrong, "; ".join(f"{path!r} was {was[path]}, and is {now[path]}" for path in wrong))


@check("augmentation", after=(*BASICS, "batch_kept"))
def labels_kept(s: Subject, call: Call) -> None:
    """Labels or ids that change unsaid spoil metrics, caches and the task loss. Do: leave target and id alone, or
    declare changes_labels = True."""
    skip_if(s.fresh().changes_labels, "declares changes_labels")
    names = [path for path in _changed(s, call) if path.rpartition("/")[2] in LABELS]
    fail_if(names, f"it changed {', '.join(names)}")


@check("augmentation", after=(*BASICS, "batch_kept"))
def inputs_as_declared(s: Subject, call: Call) -> None:
    """A cached teacher answers for inputs as they were. Do: declare changes_inputs = True."""
    skip_if(s.fresh().changes_inputs, "declares changes_inputs")
    names = _changed(s, call)
    fail_if(names, f"declares changes_inputs = False, and changed {', '.join(names)}")


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
        indices = isinstance(each, Tensor) and each.dtype == torch.int64 and each.dim() == 1 and len(each)
        fail_if(not indices, f"draw gave {getattr(each, 'dtype', type(each).__name__)}, not int64 indices")
        outside = each[(each < 0) | (each >= size)].tolist()
        fail_if(outside, f"indices {outside[:3]} of {size} samples")
    fail_if(not torch.equal(found[0], found[1]), "two calls for one epoch differ")


def _augmented(s: Subject, call: Call) -> Any:
    return s.fresh().eval()(copied(call.args["batch"]))


def _changed(s: Subject, call: Call) -> list[str]:
    """The keys that differ after it in any of some steps: what is drawn may spare a small batch once."""
    found: dict[str, None] = {}
    old = call.args["batch"]
    for s.home.run.step in range(8):
        found |= dict.fromkeys(p for p in differing(old, _augmented(s, call), rel=0) if p in leaves(old))
    s.home.run.step = 0
    return list(found)
