"""Batches and outputs by stream: cut, put together again, gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
    whole = {}
    for key in sorted(keys):
        values = [part[key] for part in parts.values()]
        whole[key] = (
            torch.cat(values) if isinstance(values[0], Tensor) else [v for part in values for v in part]
        )
    return Batch(whole)


def separated(outputs: Outputs, parts: Mapping[str, Batch]) -> Streams:
    """The outputs of a concatenated batch, by stream."""
    found, start = {}, 0
    for name, part in parts.items():
        found[name] = outputs.at(slice(start, start + len(part)))
        start += len(part)
    return found


def joined(chunks: Sequence[Batch], seen: Sequence[Streams]) -> Streams:
    """What a model said of the chunks of a batch, put together again and detached.

    A stream that no chunk has an answer for is left out; ``rows`` count from the start of the whole batch.
    """
    found: Streams = {}
    for stream in dict.fromkeys(name for each in seen for name in each):
        pieces, start = [], 0
        for chunk, each in zip(chunks, seen, strict=True):
            if stream in each:
                piece = each[stream].detach()
                pieces.append(piece if piece.rows is None else replace(piece, rows=piece.rows + start))
            start += len(chunk.part(stream))
        found[stream] = pieces[0] if len(pieces) == 1 else _mapped(pieces, torch.cat)
    return found


def gathered(outputs: Outputs) -> Outputs:
    """All ranks' outputs, differentiably."""
    return replace(_mapped([outputs], lambda values: parallel.gather(values[0])), rows=None)


def gathered_batch(batch: Batch) -> Batch:
    """All ranks' samples; values that are no tensors stay this rank's own."""
    return Batch(
        {k: parallel.gather(v) if isinstance(v, Tensor) else v for k, v in batch.items()},
        {name: gathered_batch(part) for name, part in batch.parts.items()},
    )


def renamed(outputs: Outputs, mapping: Mapping[str, str] | None) -> Outputs:
    """The outputs with tensors also under the names that a loss gave them (name -> where it is)."""
    extra = {name: outputs[path] for name, path in (mapping or {}).items() if name != path}
    return with_tensors(outputs, extra) if extra else outputs


def with_tensors(outputs: Outputs, tensors: Mapping[str, Tensor]) -> Outputs:
    return replace(outputs, tensors={**outputs.tensors, **tensors})


def _mapped(pieces: Sequence[Outputs], join: Callable[[list[Tensor]], Tensor]) -> Outputs:
    first = pieces[0]

    def both(get: Callable[[Outputs], Tensor | None]) -> Any:
        values = [value for piece in pieces if (value := get(piece)) is not None]
        return join(values) if values else None

    hidden = both(lambda o: o.unembed and o.unembed.hidden)
    return replace(
        first,
        logits=both(lambda o: o.logits),
        mask=both(lambda o: o.mask),
        target=both(lambda o: o.target),
        unembed=None if first.unembed is None else Unembed(hidden, *first.unembed[1:]),
        topk=first.topk
        and TopK(*(join([p.topk[i] for p in pieces if p.topk]) for i in range(len(TopK._fields)))),
        tensors={key: join([p.tensors[key] for p in pieces]) for key in first.tensors},
        rows=both(lambda o: o.rows),
    )
