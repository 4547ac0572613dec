"""Batches and outputs: as a model sees them, cut by stream, put together again, gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kdcore import parallel
from kdcore.types import Batch, Outputs, TopK, Unembed

Streams = dict[str, Outputs]


def viewed(batch: Batch, view: Mapping[str, str] | None) -> Batch:
    """The batch as a model sees it: a shallow copy; ``view`` names whose values stand where."""
    mine = batch.copy()
    mine.update({key: batch[source] for key, source in (view or {}).items()})
    return mine


def aligned(outputs: Outputs, seen: Batch, view: Mapping[str, str] | None) -> Outputs:
    """A view of ``target`` or ``mask`` holds for the losses, too, where the model gives none of its own."""
    keys = [key for key in ("target", "mask") if key in (view or {}) and getattr(outputs, key) is None]
    return replace(outputs, **{key: seen[key] for key in keys}) if keys else outputs


def concatenated(parts: Mapping[str, Batch]) -> Batch:
    """The streams as one batch, one after the other, of the keys that all have."""
    keys = set.intersection(*(set(part) for part in parts.values()))
    return Batch({key: _joined([part[key] for part in parts.values()]) for key in sorted(keys)})


def separated(outputs: Outputs, parts: Mapping[str, Batch]) -> Streams:
    """The outputs of a concatenated batch, by stream."""
    ends = list(accumulate(map(len, parts.values())))
    return {
        n: outputs.at(slice(end - len(part), end)) for (n, part), end in zip(parts.items(), ends, strict=True)
    }


def joined(pieces: Sequence[Outputs]) -> Outputs:
    """What a model said of several batches as of one, detached."""
    whole: Outputs = _joined([piece.detach() for piece in pieces])
    return whole


def gathered(outputs: Outputs) -> Outputs:
    """All ranks' outputs, differentiably."""
    whole: Outputs = _joined([outputs], lambda values: parallel.gather(values[0]))
    return replace(whole, rows=None)


def gathered_batch(batch: Batch) -> Batch:
    """All ranks' samples; values that are no tensors stay this rank's own."""
    return batch._map(lambda value: parallel.gather(value) if isinstance(value, Tensor) else value)


def renamed(outputs: Outputs, mapping: Mapping[str, str] | None) -> Outputs:
    """The outputs with tensors also under the names that a loss gave them (name -> where it is)."""
    extra = {name: outputs[path] for name, path in (mapping or {}).items() if name != path}
    return with_tensors(outputs, extra) if extra else outputs


def with_tensors(outputs: Outputs, tensors: Mapping[str, Tensor]) -> Outputs:
    return replace(outputs, tensors={**outputs.tensors, **tensors})


def _joined(values: Sequence[Any], join: Callable[[Any], Any] = torch.cat) -> Any:
    """Values of one form as one: tensors joined, lists added up, all that has fields field by field."""
    first = values[0]
    if isinstance(first, Outputs):
        each = {f.name: [getattr(value, f.name) for value in values] for f in fields(Outputs)}
        return Outputs(**{name: _joined(column, join) for name, column in each.items()})
    if isinstance(first, Unembed):  # one output layer for all
        return first._replace(hidden=join([value.hidden for value in values]))
    if isinstance(first, dict):
        return {key: _joined([value[key] for value in values], join) for key in first}
    if isinstance(first, TopK):
        return TopK(*(join(column) for column in zip(*values, strict=True)))
    if isinstance(first, Tensor):
        return join(values)
    return None if first is None else [item for value in values for item in value]
