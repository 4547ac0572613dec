"""Data: which samples come in which step, and the batches made of them.

The order is a pure function of (seed, stream, cycle), and what is random in a sample of (seed, epoch,
stream, id), so a run resumed at step k sees what it would have seen: there is no loader state to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcore.errors import InputError, KDError, cause, nearest
from kdcore.signature import import_string, schema_of
from kdcore.tables import DataTable
from kdcore.types import Batch, Data

SPLITS = ("train", "tune", "val", "test")


def key_seed(*parts: Any) -> int:
    """A 63-bit seed from anything with a stable repr."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Key(NamedTuple):
    """One sample of one step."""

    stream: str
    cycle: int
    index: int  # type: ignore[assignment] # hides tuple.index, which no key needs


class Keyed(Dataset[Any]):
    """The streams' data sets behind keys. Items get an ``id`` and their keyed randomness here."""

    def __init__(self, streams: Mapping[str, Any], seed: int) -> None:
        self.streams, self.seed = dict(streams), seed

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        parts = {name: [k for k in keys if k.stream == name] for name in self.streams}
        made = {name: self._part(name, chosen) for name, chosen in parts.items() if chosen}
        return next(iter(made.values())) if len(self.streams) == 1 else Batch(parts=made)

    def _part(self, name: str, keys: Sequence[Key]) -> Batch:
        data = self.streams[name]
        if hasattr(data, "batch") and not hasattr(data, "augment"):
            index = torch.tensor([k.index for k in keys])
            values = dict(data.batch(index))
            values.setdefault("id", index)
            return Batch(values)
        return collate([self._item(data, key) for key in keys], data)

    def _item(self, data: Any, key: Key) -> dict[str, Any]:
        item = dict(data[key.index])
        item.setdefault("id", key.index)
        if hasattr(data, "augment"):
            seed = key_seed(self.seed, "sample", key.cycle, key.stream, int(item["id"]))
            item = data.augment(item, np.random.default_rng(seed))
        return item


class Order:
    """The batch sampler: ``keys(step)`` is what the global batch of that step holds.

    The stream ``epoch`` ends the epoch; the others cycle on, their position following from the step.
    """

    def __init__(
        self, sizes: Mapping[str, int], batch_sizes: Mapping[str, int], epoch: str, seed: int
    ) -> None:
        self.sizes, self.batch_sizes, self.epoch_stream, self.seed = (
            dict(sizes),
            dict(batch_sizes),
            epoch,
            seed,
        )
        self.steps_per_epoch = -(-sizes[epoch] // batch_sizes[epoch])
        self.draw: Callable[[int, int], Tensor | None] = lambda size, cycle: None
        self.drawn: dict[int, Tensor] = {}
        self._permutation = lru_cache(maxsize=2 * len(sizes) + 2)(self._permute)

    def _permute(self, stream: str, cycle: int) -> list[int]:
        rng = np.random.default_rng(key_seed(self.seed, "order", stream, cycle))
        return [int(i) for i in rng.permutation(self.sizes[stream])]

    def follow(self, draw: Callable[[int, int], Tensor | None], every: int | None) -> None:
        """Let an augmentation draw the epoch's stream, in blocks of ``every`` steps, or of its whole length."""
        self.draw, self.steps_per_epoch = draw, every or self.steps_per_epoch

    def begin_epoch(self, epoch: int) -> None:
        """Ask the augmentation (if it draws) for this epoch's block, once; the block is part of the state."""
        size, batch = self.sizes[self.epoch_stream], self.batch_sizes[self.epoch_stream]
        if epoch in self.drawn or (block := self.draw(size, epoch)) is None:
            return
        if not isinstance(block, Tensor) or block.dim() != 1 or block.dtype != torch.int64:
            given = (
                f"{block.dtype} {list(block.shape)}" if isinstance(block, Tensor) else type(block).__name__
            )
            problem = "draws no indices (a choice as bool is not one: chosen.nonzero().flatten())"
            raise InputError("augmentation", problem, given=given, allowed="a tensor, int64 [n]")
        least = (self.steps_per_epoch - 1) * batch + 1
        if len(block) < least or not 0 <= int(block.min()) <= int(block.max()) < size:
            given = (
                f"{len(block)} indices from {int(block.min())} to {int(block.max())}"
                if len(block)
                else "none"
            )
            allowed = f"{least} or more, each below {size}"
            raise InputError("augmentation", "draws no such samples", given=given, allowed=allowed)
        self.drawn = {epoch: block}

    def _sequence(self, stream: str, cycle: int) -> Sequence[int] | Tensor:
        if stream == self.epoch_stream and cycle in self.drawn:
            return self.drawn[cycle]
        return self._permutation(stream, cycle)

    def keys(self, step: int) -> list[Key]:
        epoch, inner = divmod(step, self.steps_per_epoch)
        found = []
        for name, size in self.batch_sizes.items():
            if name == self.epoch_stream:
                sequence = self._sequence(name, epoch)
                found += [Key(name, epoch, int(i)) for i in sequence[inner * size : (inner + 1) * size]]
                continue
            for place in range(step * size, (step + 1) * size):
                cycle, offset = divmod(place, self.sizes[name])
                found.append(Key(name, cycle, self._permutation(name, cycle)[offset]))
        return found


class StepSampler:
    """The keys of the steps that are left of one epoch, as one rank sees them."""

    def __init__(self, order: Order, rank: int = 0, world: int = 1) -> None:
        self.order, self.rank, self.world, self.start, self.end = order, rank, world, 0, 0

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.end):
            keys = self.order.keys(step)
            yield [
                k
                for name in self.order.sizes
                for k in shard([k for k in keys if k.stream == name], self.rank, self.world)
            ]

    def __len__(self) -> int:
        return self.end - self.start


def shard(items: list[Any], rank: int, world: int) -> list[Any]:
    """Rank's contiguous share of a global batch; shares differ by one sample at most."""
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def collate(items: Sequence[Mapping[str, Any]], data: Any = None) -> Batch:
    """Items to a batch: arrays and tensors are stacked, numbers become tensors, anything else a list."""
    if hasattr(data, "collate"):
        return Batch(data.collate(items))
    return Batch({key: _stack([item[key] for item in items]) for key in items[0]})


def _stack(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(values)
    if isinstance(first, np.ndarray):
        return torch.from_numpy(np.stack(values))
    if isinstance(first, bool | int | float | np.number):
        return torch.tensor(values)
    return values


class Source:
    """A recipe's data, built and checked: streams for training, one loader for each other split."""

    def __init__(self, table: DataTable, seed: int) -> None:
        self.table, self.seed = table, seed
        self.data = _load(table)
        train = self.data.train if isinstance(self.data.train, Mapping) else {"main": self.data.train}
        self.streams = dict(train)
        self.epoch = table.epoch or next(iter(self.streams))
        self._check()
        if self.data.tune is None and table.tune:
            self._carve()

    def _check(self) -> None:
        if self.epoch not in self.streams:
            raise InputError(
                "data.epoch", "no stream of this name", given=self.epoch, allowed=list(self.streams)
            )
        for name, split in [*self.streams.items(), ("val", self.data.val), ("test", self.data.test)]:
            if split is None or _length(split, name) == 0:
                raise InputError("data.source", f"the data set {name!r} is empty", given=self.table.source)
        if isinstance(self.table.batch_size, dict) and set(self.table.batch_size) != set(self.streams):
            raise InputError(
                "data.batch_size",
                "one size a stream is needed",
                given=self.table.batch_size,
                allowed=list(self.streams),
            )

    def _carve(self) -> None:
        """Take the share ``tune`` from the epoch's stream, by the split seed alone (the same in every arm)."""
        whole = self.streams[self.epoch]
        order = np.random.default_rng(key_seed(self.table.split_seed, "tune")).permutation(len(whole))
        cut = round(self.table.tune * len(whole))
        if not 0 < cut < len(whole):
            raise InputError("data.tune", "leaves a split empty", given=self.table.tune)
        self.data.tune = Part(whole, np.sort(order[:cut]))
        self.streams[self.epoch] = Part(whole, np.sort(order[cut:]))

    @property
    def batch_sizes(self) -> dict[str, int]:
        size = self.table.batch_size
        return dict(size) if isinstance(size, dict) else dict.fromkeys(self.streams, size)

    def order(self) -> Order:
        return Order({k: len(v) for k, v in self.streams.items()}, self.batch_sizes, self.epoch, self.seed)

    def train_loader(self, sampler: StepSampler) -> DataLoader[Any]:
        return DataLoader(
            Keyed(self.streams, self.seed),
            batch_sampler=sampler,
            collate_fn=_same,
            num_workers=self.table.workers,
        )

    def loader(self, split: str) -> DataLoader[Any]:
        """Batches of a split in order, without augmentation. ``train`` is the epoch's stream."""
        if split not in SPLITS:
            raise InputError(
                "data", "no such split", given=split, allowed=SPLITS, hint=nearest(split, SPLITS)
            )
        data = self.streams[self.epoch] if split == "train" else getattr(self.data, split)
        if data is None:
            raise InputError(
                "data.tune", "this recipe has no tune split", hint="set data.tune, for example 0.1"
            )
        return DataLoader(Plain(data), batch_size=self.table.eval_batch_size, collate_fn=_same)

    def sample(self, count: int = 4) -> Batch:
        """A small real batch of the first samples of every stream, for the dry run."""
        keys = [Key(n, 0, i) for n, d in self.streams.items() for i in range(min(count, len(d)))]
        try:
            return Keyed(self.streams, self.seed).__getitems__(keys)
        except KDError:
            raise
        except Exception as error:  # items may be anything
            problem = f"its first items make no batch: {cause(error)}"
            allowed = "items that are dicts of tensors, arrays, numbers or text, all with the same keys"
            raise InputError("data.source", problem, given=self.table.source, allowed=allowed) from error


class Part(Dataset[Any]):
    """Some items of a data set, with their identity kept: the id is the index in the whole set."""

    def __init__(self, whole: Any, indices: np.ndarray[Any, Any]) -> None:
        self.whole, self.indices = whole, [int(i) for i in indices]
        for name in ("augment", "collate"):
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = self.indices[index]
        return {"id": where, **self.whole[where]}


class Plain(Dataset[Any]):
    """A split as it is: ids, no randomness."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> Batch:
        if hasattr(self.data, "batch"):
            index = torch.tensor(indices)
            return Batch({"id": index, **self.data.batch(index)})
        return collate([{"id": i, **self.data[i]} for i in indices], self.data)


def _same(batch: Any) -> Any:
    return batch


class _Ids:
    """Data for methods without data: ids alone."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        return {"id": index}


def _load(table: DataTable) -> Data:
    if table.use == "ids":
        if not table.count:
            raise InputError("data.count", 'data of use = "ids" needs a count')
        ids = _Ids(table.count)
        return Data(ids, ids, ids)
    source = import_string(table.source, "data.source")
    checked = schema_of(source, table.source).validate(table.args, "data.args")
    try:
        data = source(**checked)
    except KDError:
        raise
    except Exception as error:  # a file that is not there, a download that fails
        raise InputError("data.source", f"it fails: {cause(error)}", given=table.source) from error
    if not isinstance(data, Data):
        given = type(data).__name__
        raise InputError(
            "data.source", f"{table.source} returned no data", given=given, allowed="kdcore.Data"
        )
    return data


def _length(data: Any, name: str) -> int:
    try:
        return len(data)
    except TypeError:
        problem = f"the data set {name!r} has no length"
        allowed = "a map-style data set: len(data) and data[index] -> dict"
        raise InputError("data.source", problem, given=type(data).__name__, allowed=allowed) from None
