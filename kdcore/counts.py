"""What a term is divided by: the samples and the supervised positions of the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdcore import parallel
from kdcore.errors import InputError
from kdcore.kinds import Student
from kdcore.streams import viewed
from kdcore.types import Batch, Outputs

ALL = ""  # all streams together


@dataclass
class Counts:
    """Global counts of a step by stream, ``ALL`` among them. Empty: the batch at hand is the global batch."""

    samples: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, batch: Batch, student: Student, device: torch.device, view: Mapping[str, str] | None = None
    ) -> Counts:
        """Counted over all ranks, before any forward, in the batch as the student's ``view`` shows it."""
        seen = {stream: viewed(batch.part(stream), view) for stream in batch.streams}
        samples = {stream: parallel.total(len(part), device) for stream, part in seen.items()}
        masks = {stream: student.supervised(part) for stream, part in seen.items()}
        tokens = {s: parallel.total(mask.sum(), device) for s, mask in masks.items() if mask is not None}
        return cls(samples | {ALL: sum(samples.values())}, tokens)

    def share(self, term: Tensor, stream: str, outputs: Outputs | None, part: Batch) -> Tensor:
        """A term's share of the global mean: over samples for [B], over supervised positions for [B,L]."""
        size = self.samples.get(stream, len(part))
        if term.dim() == 0:
            return term * (len(part) / size) if size else term
        if term.dim() == 1:
            return term.sum() / max(size, 1)
        mask = mask_of(term, outputs or Outputs(), part)
        if mask is None:
            return term.flatten(1).mean(1).sum() / max(size, 1)
        count = self.tokens[stream] if stream in self.tokens else float(mask.sum())
        return torch.where(mask, term, 0.0).sum() / max(count, 1.0)


def mask_of(term: Tensor, outputs: Outputs, part: Batch) -> Tensor | None:
    """Bool, of the term's shape: the positions that count, by the model or the batch; None where neither says it."""
    target = part.get("target")
    own = target if isinstance(target, Tensor) and target.shape == term.shape else None
    known = (outputs.mask, _labelled(outputs.target), part.get("mask"), _labelled(own))
    mask = next((each for each in known if each is not None), None)
    if mask is not None and mask.shape != term.shape:
        raise InputError("loss", f"a term {tuple(term.shape)} does not fit the mask {tuple(mask.shape)}")
    return mask if mask is None else mask.bool()


def _labelled(target: Tensor | None) -> Tensor | None:
    return None if target is None else target != -100


def weighed(value: Any, column: Tensor, rows: Tensor | None, name: str) -> Any:
    """A term (or several) times each sample's weight [B]; one of ``rows`` alone is 0 for the other samples."""
    if value is None or isinstance(value, dict):
        return value and {key: weighed(each, column, rows, name) for key, each in value.items()}
    if value.dim() == 0:
        problem = f"loss {name!r} gives one value a batch: a router needs one value a sample, [B]"
        raise InputError("router", problem)
    share = column if rows is None else column[rows]
    weighted = value * share.view(-1, *[1] * (value.dim() - 1))
    if rows is None:
        return weighted
    return weighted.new_zeros(len(column), *value.shape[1:]).index_copy(0, rows, weighted)
