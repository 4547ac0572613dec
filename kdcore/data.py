"""A recipe's data: read and checked, and the batches made of them.

What is random in a sample is a pure function of (seed, epoch, stream, id); ``kdcore.order`` says which samples come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kdcore.datasets import TensorSet
from kdcore.errors import InputError, KDError, RunError, blame, cause
from kdcore.guards import digest
from kdcore.order import Key, Order, StepSampler, key_seed, shard
from kdcore.signature import import_string, schema_of
from kdcore.tables import DataTable
from kdcore.types import Batch, Data

__all__ = ["Key", "Keyed", "Source", "batch_of", "collate", "key_seed", "shard"]
SPLITS = ("train", "tune", "val", "test")


def batch_of(data: Any, keys: Sequence[Key], seed: int | None = None) -> Batch:
    """Samples of a data set, each with its id (the index, where it has none); augmented where a seed is given.

    Raises RunError where the data set raises, with the samples that it was asked for.
    """
    augment = None if seed is None else getattr(data, "augment", None)
    if hasattr(data, "batch") and augment is None:
        index = torch.tensor([key.index for key in keys])
        with _reading(keys):
            return Batch({"id": index, **data.batch(index)})
    items = [_item(data, key, seed, augment) for key in keys]
    with _reading(keys):
        return Batch(data.collate(items)) if hasattr(data, "collate") else collate(items)


def _item(data: Any, key: Key, seed: int | None, augment: Any) -> dict[str, Any]:
    with _reading([key]):
        item: dict[str, Any] = {"id": key.index, **data[key.index]}
        if augment is not None:
            parts = seed, "sample", key.cycle, key.stream, int(item["id"])
            item = augment(item, np.random.default_rng(key_seed(*parts)))
        return item


@contextmanager
def _reading(keys: Sequence[Key]) -> Iterator[None]:
    try:
        yield
    except KDError:
        raise
    except (Exception, SystemExit) as error:
        numbers = ", ".join(str(key.index) for key in keys[:8]) + (", ..." if len(keys) > 8 else "")
        stream = "train" if keys[0].stream == "main" else keys[0].stream
        hint = "mend the data, then kd resume goes on from the last state; --debug shows where"
        said = f"{'samples' if len(keys) > 1 else 'sample'} {numbers} of {stream!r}: {cause(error)}"
        raise RunError(f"{said}\n  hint    {hint}") from error


def collate(items: Sequence[Mapping[str, Any]]) -> Batch:
    """Items to a batch: arrays and tensors are stacked, numbers become tensors, anything else a list."""
    return Batch({key: _stack([item[key] for item in items]) for key in items[0]})


def _stack(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(values)
    if isinstance(first, np.ndarray):
        return torch.from_numpy(np.stack(values))
    return torch.tensor(values) if isinstance(first, bool | int | float | np.number) else values


class Keyed(Dataset[Any]):
    """The streams' data sets behind keys: a batch has a part a stream, where there are several."""

    def __init__(self, streams: Mapping[str, Any], seed: int) -> None:
        self.streams, self.seed = dict(streams), seed

    def __getitems__(self, keys: Sequence[Key]) -> Batch | RunError:
        """A batch; in a worker process what it fails with, which torch would raise as a traceback in words."""
        try:
            return self.batch(keys)
        except RunError as error:
            if get_worker_info() is None:
                raise
            return error

    def batch(self, keys: Sequence[Key]) -> Batch:
        chosen = {name: [key for key in keys if key.stream == name] for name in self.streams}
        parts = {n: batch_of(self.streams[n], mine, self.seed) for n, mine in chosen.items() if mine}
        return Batch(parts=parts) if len(self.streams) > 1 else next(iter(parts.values()))


class Part:
    """Some items of a data set, with their identity kept: the id is the index in the whole set."""

    def __init__(self, whole: Any, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, indices
        for name in ("augment", "collate"):
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = self.indices[index]
        return {"id": where, **self.whole[where]}


class Batches:
    """A data set in order, without augmentation, in batches of ``size``: from its start each time it is iterated."""

    def __init__(self, data: Any, name: str, size: int) -> None:
        self.data, self.name, self.size = data, name, size
        self.starts = range(0, len(data), size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Batch]:
        return (batch_of(self.data, _first(self.name, self.data, self.size, start)) for start in self.starts)


class Source:
    """A recipe's data, built and checked: streams for training, and the other splits."""

    def __init__(self, table: DataTable, seed: int) -> None:
        self.table, self.seed = table, seed
        self.data = load(table)
        train = self.data.train
        self.streams = dict(train) if isinstance(train, Mapping) else {"main": train}
        self.epoch = table.epoch or next(iter(self.streams))
        self._check()
        if self.data.tune is None and table.tune:
            self._carve()

    def _check(self) -> None:
        names, size = list(self.streams), self.table.batch_size
        if self.epoch not in names:
            raise InputError("data.epoch", "no stream of this name", given=self.epoch, allowed=names)
        for name, split in [*self.streams.items(), ("val", self.data.val), ("test", self.data.test)]:
            if split is None or _length(split, name) == 0:
                raise InputError("data.source", f"the data set {name!r} is empty", given=self.table.source)
        if isinstance(size, dict) and set(size) != set(names):
            raise InputError("data.batch_size", "one size a stream is needed", given=size, allowed=names)

    @cached_property
    def doubts(self) -> list[str]:
        """Warnings, from what costs nothing: ids of sets in memory, and the first samples of others."""
        train, found = self.streams[self.epoch], list[str]()
        if self.table.use == "ids":  # are the samples of every split
            return found
        with suppress(RunError):  # a sample that cannot be read is told where it is needed
            ids = _ids(train)
            if len(set(ids)) < len(ids):
                found.append(
                    "samples of train share an id: what is random in a sample, and a cache, go by it."
                )
            for name in ("val", "test"):
                split = getattr(self.data, name)
                if split is train or _repeats(train, split):
                    found.append(f"samples of train are in {name}: its metrics say nothing of new data.")
        return found

    def _carve(self) -> None:
        """Take the share ``tune`` from the epoch's stream, by the split seed alone (the same in every arm)."""
        whole = self.streams[self.epoch]
        order = np.random.default_rng(key_seed(self.table.split_seed, "tune")).permutation(len(whole))
        cut = round(self.table.tune * len(whole))
        if not 0 < cut < len(whole):
            raise InputError("data.tune", "leaves a split empty", given=self.table.tune)
        self.data.tune = Part(whole, sorted(order[:cut].tolist()))
        self.streams[self.epoch] = Part(whole, sorted(order[cut:].tolist()))

    def facts(self) -> dict[str, Any]:
        """For the report: what the source says of itself, and the number of samples of each stream and split."""
        streams = {"train" if name == "main" else name: data for name, data in self.streams.items()}
        splits = {"tune": self.data.tune, "val": self.data.val, "test": self.data.test}
        counts = {name: len(data) for name, data in {**streams, **splits}.items() if data is not None}
        return {"description": self.data.description, "samples": counts}

    @property
    def batch_sizes(self) -> dict[str, int]:
        size = self.table.batch_size
        return dict(size) if isinstance(size, dict) else dict.fromkeys(self.streams, size)

    def order(self) -> Order:
        return Order({k: len(v) for k, v in self.streams.items()}, self.batch_sizes, self.epoch, self.seed)

    def train_loader(self, sampler: StepSampler) -> DataLoader[Any]:
        keyed, workers = Keyed(self.streams, self.seed), self.table.workers
        return DataLoader(keyed, batch_sampler=sampler, collate_fn=_same, num_workers=workers)

    def loader(self, split: str) -> Batches:
        """Batches of a split in order, without augmentation. ``train`` is the epoch's stream."""
        if split not in SPLITS:
            raise InputError("data", "no such split", given=split, allowed=SPLITS)
        data = self.streams[self.epoch] if split == "train" else getattr(self.data, split)
        if data is None:
            hint = "set data.tune, for example 0.1"
            raise InputError("data.tune", "this recipe has no tune split", hint=hint)
        return Batches(data, split, self.table.eval_batch_size)

    def sample(self, count: int = 4) -> Batch:
        """A small real batch of the first samples of every stream, for the dry run."""
        keys = [key for name, data in self.streams.items() for key in _first(name, data, count)]
        allowed = "items that are dicts of tensors, arrays, numbers or text, all with the same keys"
        problem, given = "its first items make no batch", self.table.source
        with blame("data.source", problem, given=given, allowed=allowed):
            try:
                return Keyed(self.streams, self.seed).batch(keys)
            except RunError as error:  # nothing runs yet
                raise KDError(str(error).partition("\n")[0]) from error


def _first(name: str, data: Any, count: int, start: int = 0) -> list[Key]:
    return [Key(name, 0, index) for index in range(start, min(start + count, len(data)))]


def _ids(data: Any) -> list[int]:
    """The ids of a set in memory, of another one those of its first samples."""
    whole = isinstance(data, TensorSet)
    return [int(i) for i in (data.values if whole else batch_of(data, _first("", data, 8)))["id"]]


def _repeats(train: Any, split: Any) -> bool:
    """Whether a sample is in both: ids may count from 0 in each, so what has one id is compared."""
    mine, theirs = ({each: index for index, each in enumerate(_ids(data))} for data in (train, split))
    shared = [(mine[each], theirs[each]) for each in theirs if each in mine]
    return any(
        digest(batch_of(train, [Key("", 0, a)])) == digest(batch_of(split, [Key("", 0, b)]))
        for a, b in shared[:8]
    )


def _same(batch: Any) -> Any:
    return batch


def load(table: DataTable) -> Data:
    """What the recipe's data source returns for its arguments, checked."""
    if table.use == "ids":
        if not table.count:
            raise InputError("data.count", 'data of use = "ids" needs a count')
        ids = TensorSet(torch.arange(table.count))
        return Data(ids, ids, ids)
    source = import_string(table.source, "data.source")
    checked = schema_of(source, table.source).validate(table.args, "data.args")
    with blame("data.source", "it fails", given=table.source):  # a file that is absent, a download
        data = source(**checked)
    if not isinstance(data, Data):
        problem, given = f"{table.source} returned no data", type(data).__name__
        raise InputError("data.source", problem, given=given, allowed="kdcore.Data")
    return data


def _length(data: Any, name: str) -> int:
    try:
        return len(data)
    except TypeError:
        problem, given = f"the data set {name!r} has no length", type(data).__name__
        allowed = "a map-style data set: len(data) and data[index] -> dict"
        raise InputError("data.source", problem, given=given, allowed=allowed) from None
