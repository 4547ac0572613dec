"""Which samples come in which step: a pure function of (seed, stream, cycle), so there is no loader state to keep.

A run resumed at step k sees what it would have seen, and every rank knows the whole batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcore import parallel
from kdcore.errors import InputError


def key_seed(*parts: Any) -> int:
    """A 63-bit seed from anything with a stable repr."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Key(NamedTuple):
    """One sample of one step."""

    stream: str
    cycle: int
    index: int  # type: ignore[assignment] # hides tuple.index, which no key needs


class Order:
    """``keys(step)`` is what a batch holds. The stream ``epoch`` ends the epoch; the others go round and round."""

    def __init__(
        self, sizes: Mapping[str, int], batch_sizes: Mapping[str, int], epoch: str, seed: int
    ) -> None:
        self.sizes, self.batch_sizes = dict(sizes), dict(batch_sizes)
        self.epoch_stream, self.seed = epoch, seed
        self.steps_per_epoch = -(-sizes[epoch] // batch_sizes[epoch])
        self.draw: Callable[[int, int], Tensor | None] = lambda size, epoch: None
        self.drawn: dict[int, Tensor] = {}  # the block of the epoch at hand; part of the run's state
        self._permutation = lru_cache(maxsize=2 * len(sizes) + 2)(self._permute)

    def _permute(self, stream: str, cycle: int) -> list[int]:
        rng = np.random.default_rng(key_seed(self.seed, "order", stream, cycle))
        return [int(i) for i in rng.permutation(self.sizes[stream])]

    def follow(self, draw: Callable[[int, int], Tensor | None], every: int | None) -> None:
        """Let an augmentation draw the epoch's stream, in blocks of ``every`` steps, or of its whole length."""
        self.draw, self.steps_per_epoch = draw, every or self.steps_per_epoch

    def begin_epoch(self, epoch: int) -> None:
        """Ask the augmentation (if it draws) for this epoch's block, once, and the same on every rank."""
        size, batch = self.sizes[self.epoch_stream], self.batch_sizes[self.epoch_stream]
        if epoch in self.drawn or (block := self.draw(size, epoch)) is None:
            return
        if not isinstance(block, Tensor) or block.dim() != 1 or block.dtype != torch.int64:
            given = f"{block.dtype} {[*block.shape]}" if isinstance(block, Tensor) else type(block).__name__
            problem = "draws no indices (a choice as bool is not one: chosen.nonzero().flatten())"
            raise InputError("augmentation", problem, given=given, allowed="a tensor, int64 [n]")
        least, values = (self.steps_per_epoch - 1) * batch + 1, block.tolist()
        if len(values) < least or not 0 <= min(values) <= max(values) < size:
            given = f"{len(values)} indices from {min(values)} to {max(values)}" if values else "none"
            allowed = f"{least} or more, each below {size}"
            raise InputError("augmentation", "draws no such samples", given=given, allowed=allowed)
        if not parallel.agree(key_seed(values)):
            hint = "draw with self.run.rng(key), or from what was gathered over the processes"
            raise InputError("augmentation", "draws other samples in each process", hint=hint)
        self.drawn = {epoch: block}

    def keys(self, step: int, rank: int = 0, world: int = 1) -> list[Key]:
        """What the global batch of a step holds, or one rank's share of it."""
        epoch, inner = divmod(step, self.steps_per_epoch)
        found = []
        for name, size in self.batch_sizes.items():
            if name == self.epoch_stream:
                block = self.drawn[epoch] if epoch in self.drawn else self._permutation(name, epoch)
                keys = [Key(name, epoch, int(i)) for i in block[inner * size : (inner + 1) * size]]
            else:
                keys = self.cycled(name, step * size, size)
            found += shard(keys, rank, world)
        return found

    def cycled(self, stream: str, first: int, count: int) -> list[Key]:
        """``count`` samples of a stream that goes round and round, from position ``first`` on."""
        places = (divmod(place, self.sizes[stream]) for place in range(first, first + count))
        return [Key(stream, cycle, self._permutation(stream, cycle)[at]) for cycle, at in places]


class StepSampler:
    """The keys of ``steps``, as one rank sees them: what a DataLoader takes as its batch sampler."""

    def __init__(self, order: Order, rank: int = 0, world: int = 1) -> None:
        self.order, self.rank, self.world, self.steps = order, rank, world, range(0)

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.order.keys(step, self.rank, self.world) for step in self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def shard(items: list[Any], rank: int, world: int) -> list[Any]:
    """Rank's contiguous share of a global batch; shares differ by one sample at most."""
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]
