"""A memory of the training samples' embeddings, and negatives drawn from it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import InputError


class MemoryBank(nn.Module):
    """One vector of length 1 for each of M samples and each side, a running average over the epochs.

    ``ids`` int64 [M], all different; ``groups`` int64 [M]: samples of one group are never each other's
    negatives (the class, or the sample itself). The vectors begin as small random ones.
    """

    student: Tensor
    teacher: Tensor
    _ids: Tensor
    _members: Tensor
    _start: Tensor
    _size: Tensor

    def __init__(self, ids: Tensor, groups: Tensor, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        self.momentum = momentum
        by_id = ids.argsort()
        ids, groups = ids[by_id], groups[by_id]
        _, group, counts = groups.unique(return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise InputError("classics.crd", "all training samples are of one class: there are no negatives")
        bound = math.sqrt(3 / dim)
        for side in ("student", "teacher"):
            self.register_buffer(side, torch.empty(len(ids), dim).uniform_(-bound, bound))
        self._fixed(_ids=ids, _members=group.argsort(stable=True))
        self._fixed(_start=(counts.cumsum(0) - counts)[group], _size=counts[group])

    def _fixed(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():  # made anew from the data, so not part of the state
            self.register_buffer(name, value, persistent=False)

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, ids: Tensor) -> Tensor:
        """Where samples are in the bank: int64 [B] -> int64 [B]. InputError for one that is not."""
        found = torch.searchsorted(self._ids, ids).clamp_max(len(self) - 1)
        if not torch.equal(self._ids[found], ids):
            raise InputError(
                "classics.crd", "a sample of the batch is not in the memory of the training stream"
            )
        return found

    def draw(self, rows: Tensor, count: int, rng: torch.Generator) -> Tensor:
        """``count`` negatives for each row, uniform over the other groups, with replacement: int64 [B, count]."""
        start, size = self._start[rows, None], self._size[rows, None]
        uniform = torch.rand(len(rows), count, generator=rng, dtype=torch.float64).to(rows.device)
        place = (uniform * (len(self) - size)).long()
        return self._members[place + size * (place >= start)]  # skip the row's own group

    @torch.no_grad()
    def update(self, rows: Tensor, student: Tensor, teacher: Tensor) -> None:
        """v <- the direction of momentum * v + (1 - momentum) * new, for these rows of both sides."""
        for memory, fresh in ((self.student, student), (self.teacher, teacher)):
            mixed = self.momentum * memory[rows] + (1 - self.momentum) * fresh.to(memory.dtype)
            memory.index_copy_(0, rows, F.normalize(mixed))
