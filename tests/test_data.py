"""Data order as a pure function of the step, streams, splits, batches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from kdcore.data import Key, Source, collate
from kdcore.datasets import digits
from kdcore.errors import InputError
from kdcore.order import Order, StepSampler, key_seed, shard
from kdcore.tables import DataTable
from kdcore.types import Batch, Data

MADE: dict[str, Data] = {}


class Numbers:
    """Items that say who they are, with keyed noise."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": self.first + index, "input": np.float32(index), "name": f"n{index}"}

    def augment(self, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**item, "noise": rng.normal()}


def two_streams() -> Data:
    return Data({"labelled": Numbers(5), "unlabelled": Numbers(12, first=100)}, Numbers(4), Numbers(4))


def empty() -> Data:
    return Data(Numbers(0), Numbers(4), Numbers(4))


def one() -> Data:
    return Data(Numbers(10), Numbers(4), Numbers(4))


def source(name: str, **table: Any) -> Source:
    return Source(DataTable(source=f"{__name__}:{name}", **table), seed=3)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__))


def test_every_sample_once_an_epoch_and_another_order_the_next() -> None:
    order = Order({"main": 10}, {"main": 4}, "main", seed=0)
    epochs = [[k.index for step in range(3) for k in order.keys(3 * epoch + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(order.keys(step)) for step in range(3)] == [4, 4, 2]


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    whole = Order({"main": 10}, {"main": 4}, "main", seed=0)
    walked = [whole.keys(step) for step in range(9)]
    assert Order({"main": 10}, {"main": 4}, "main", seed=0).keys(7) == walked[7]
    assert Order({"main": 10}, {"main": 4}, "main", seed=1).keys(7) != walked[7]


def test_the_other_streams_cycle_without_loss() -> None:
    order = Order({"labelled": 5, "unlabelled": 12}, {"labelled": 2, "unlabelled": 4}, "unlabelled", seed=0)
    seen = Counter(k.index for step in range(15) for k in order.keys(step) if k.stream == "labelled")
    assert seen == Counter(dict.fromkeys(range(5), 6))  # 15 steps of 2 are 6 rounds of 5
    assert order.steps_per_epoch == 3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_hold_the_global_batch(world: int) -> None:
    order = Order({"main": 11}, {"main": 4}, "main", seed=0)
    samplers = [StepSampler(order, rank, world) for rank in range(world)]
    for sampler in samplers:
        sampler.steps = range(3)
    for step, parts in enumerate(zip(*samplers, strict=True)):
        assert [k for part in parts for k in part] == order.keys(step)


def test_shares_differ_by_one_at_most() -> None:
    sizes = [len(shard(list(range(10)), rank, 4)) for rank in range(4)]
    assert sum(sizes) == 10
    assert max(sizes) - min(sizes) <= 1


def test_noise_of_a_sample_depends_on_epoch_and_id_alone() -> None:
    made = source("one", batch_size=4)
    keyed = made.train_loader(StepSampler(made.order())).dataset

    def noise(cycle: int, indices: list[int]) -> dict[int, float]:
        batch = keyed.__getitems__([Key("main", cycle, i) for i in indices])
        return dict(zip(batch["id"].tolist(), batch["noise"].tolist(), strict=True))

    assert noise(0, [1, 2, 3])[2] == noise(0, [2])[2]
    assert noise(0, [2])[2] != noise(1, [2])[2]
    assert noise(0, [2])[2] != noise(0, [3])[3]


def test_streams_are_parts_of_a_batch() -> None:
    made = source("two_streams", batch_size={"labelled": 2, "unlabelled": 3}, epoch="unlabelled")
    sampler = StepSampler(made.order())
    sampler.steps = range(4)
    for batch in made.train_loader(sampler):
        assert batch.streams == ("labelled", "unlabelled")
        assert len(batch.part("labelled")) == 2
        assert (batch.part("unlabelled")["id"] >= 100).all()
    assert source("two_streams", batch_size=2).epoch == "labelled"


def test_tune_is_carved_from_train_by_its_own_seed() -> None:
    first, second = source("one", tune=0.3), Source(DataTable(source=f"{__name__}:one", tune=0.3), seed=99)
    held = [int(i) for batch in first.loader("tune") for i in batch["id"]]
    kept = [int(i) for batch in first.loader("train") for i in batch["id"]]
    assert sorted(held + kept) == list(range(10))
    assert len(held) == 3
    assert held == [int(i) for batch in second.loader("tune") for i in batch["id"]]


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("empty", {}, "is empty"),
        ("one", {"epoch": "other"}, "no stream of this name"),
        ("two_streams", {"batch_size": {"labelled": 2}}, "one size a stream"),
        ("one", {"args": {"x": 1}}, "unknown parameter"),
        ("one", {"tune": 0.01}, "leaves a split empty"),
    ],
)
def test_wrong_data_in_words(name: str, table: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        source(name, **table)


def test_a_splits_batches_are_there_each_time_they_are_asked_for() -> None:
    batches = source("one", eval_batch_size=3).loader("val")
    assert len(batches) == 2
    for _ in range(2):  # a probe goes through them once a model
        assert [b["id"].tolist() for b in batches] == [[0, 1, 2], [3]]


def test_ids_alone() -> None:
    made = Source(DataTable(use="ids", count=5, batch_size=2), seed=0)
    assert [b["id"].tolist() for b in made.loader("train")] == [[0, 1, 2, 3, 4]]
    with pytest.raises(InputError, match="needs a count"):
        Source(DataTable(use="ids"), seed=0)


def test_collate_and_batches() -> None:
    batch = collate([{"id": i, "x": torch.ones(2) * i, "a": np.zeros(3), "s": f"s{i}"} for i in range(5)])
    assert batch["x"].shape == (5, 2)
    assert batch["a"].dtype == torch.float64
    assert batch.rows(torch.tensor([4, 0]))["s"] == ["s4", "s0"]
    assert batch.rows(batch["id"] > 2)["id"].tolist() == [3, 4]
    assert [len(c) for c in batch.chunks(3)] == [1, 2, 2]
    assert torch.cat([c["id"] for c in batch.chunks(3)]).tolist() == [0, 1, 2, 3, 4]
    assert len(batch.chunks(9)) == 5
    streams = Batch(parts={"a": batch, "b": batch})
    assert [len(c) for c in streams.chunks(2)] == [4, 6]


def test_seeds_are_stable_across_processes() -> None:
    # blake2b of the repr, first 8 bytes, shifted by one: worked out once with hashlib alone
    import hashlib

    expected = int.from_bytes(hashlib.blake2b(b"(0, 'order')", digest_size=8).digest(), "big") >> 1
    assert key_seed(0, "order") == expected


def test_digits_are_split_once_without_overlap() -> None:
    data = digits(labels=100)
    ids = [set(split.values["id"].tolist()) for split in (data.train, data.val, data.test)]
    assert [len(i) for i in ids] == [100, 270, 629]
    assert not ids[0] & ids[1]
    assert not ids[1] & ids[2]
    whole = digits()
    assert len(whole.train) == 1797 - 270 - 629
    assert torch.equal(whole.test.values["id"], data.test.values["id"])
    raw = data.raw([int(data.val.values["id"][0])])["input"] * np.float32(1 / 16)
    assert np.array_equal(raw[:, None], data.val[0]["input"][None].numpy())
    with pytest.raises(InputError, match="more than there are"):
        digits(labels=10_000)
