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
        found = cls()
        for stream in batch.streams:
            part = viewed(batch.part(stream), view)
            found.samples[stream] = parallel.total(len(part), device)
            mask = supervised(student, part)
            if mask is not None:
                found.tokens[stream] = parallel.total(mask.sum(), device)
        found.samples[ALL] = sum(found.samples.values())
        return found

    def share(self, term: Tensor, stream: str, outputs: Outputs | None, part: Batch) -> Tensor:
        """A term's share of the global mean: over samples for [B], over supervised positions for [B,L]."""
        size = self.samples.get(stream, len(part))
        if term.dim() == 0:
            return term * (len(part) / size) if size else term
        if term.dim() == 1:
            return term.sum() / max(size, 1)
        mask = mask_of(term, outputs, part)
        if mask is None:
            return term.flatten(1).mean(1).sum() / max(size, 1)
        count = self.tokens.get(stream)
        chosen = torch.where(mask, term, term.new_zeros(()))
        return chosen.sum() / max(count if count is not None else float(mask.sum()), 1.0)


def supervised(student: Student, part: Batch) -> Tensor | None:
    """Bool [B,L]: the positions that count, known before any forward; the student's adapter may say."""
    if hasattr(student, "supervised"):
        return student.supervised(part)  # type: ignore[no-any-return,operator]
    if "mask" in part:
        return part["mask"].bool()  # type: ignore[no-any-return]
    target = part.get("target")
    return target != -100 if isinstance(target, Tensor) and target.dim() == 2 else None


def mask_of(term: Tensor, outputs: Outputs | None, part: Batch) -> Tensor | None:
    """Bool, of the term's shape: the positions that count; None where nothing says it."""
    mask = outputs.mask if outputs is not None else None
    if mask is None and outputs is not None and outputs.target is not None:
        mask = outputs.target != -100
    if mask is None:
        mask = part.get("mask")
    if mask is None and isinstance(target := part.get("target"), Tensor) and target.shape == term.shape:
        mask = target != -100
    if mask is not None and mask.shape != term.shape:
        raise InputError("loss", f"a term {tuple(term.shape)} does not fit the mask {tuple(mask.shape)}")
    return mask.bool() if mask is not None else None


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
