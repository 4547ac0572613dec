"""The selection: the authors' picks (erjui/PCoreSet, 075a76a, on a CPU), brute force, and the card's closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kd_plugin_pcoreset.oracle import ORACLES
from kd_plugin_pcoreset.selection import Strategy, distance_to_set, entropy, farthest_first, select
from torch import Tensor

from kdcore.testing import Oracle, check_oracle


def wave(rows: int, columns: int, phase: float) -> Tensor:
    """The fixed tensors that the authors' code was run on."""
    i = torch.arange(rows * columns, dtype=torch.float64)
    return (2 * torch.sin(1.7 * i + 0.013 * i * i + phase)).reshape(rows, columns)


def mixture(rows: int, ce: float, kd: float) -> Tensor:
    """DHO's inference rule at alpha 0.5, beta 1."""
    return 0.5 * wave(rows, 5, ce).softmax(1) + 0.5 * wave(rows, 5, kd).softmax(1)


def simplex(seed: int, rows: int, classes: int = 4) -> Tensor:
    z = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * z).softmax(1)


POOL = {"p": mixture(40, 0.3, 1.1), "features": wave(40, 7, 2.0)}
LABELLED = {"p": mixture(6, 0.7, 2.3), "features": wave(6, 7, 0.2)}
AUTHORS: dict[Strategy, list[int]] = {  # strategies.py:select_queries, ten queries each
    "pcoreset": [10, 29, 27, 23, 6, 25, 2, 9, 20, 8],
    "coreset": [21, 32, 22, 24, 8, 6, 30, 16, 31, 20],
    "entropy": [35, 32, 34, 36, 38, 39, 33, 37, 13, 28],
}


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


@pytest.mark.parametrize("strategy", AUTHORS)
def test_the_picks_are_the_authors(strategy: Strategy) -> None:
    assert select(strategy, POOL, LABELLED, 10, torch.Generator()).tolist() == AUTHORS[strategy]


def test_the_corners_come_first_and_a_duplicate_last() -> None:
    one = [1.0, 0.0, 0.0]
    pool = torch.tensor([one, [0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.34, 0.33, 0.33]]).double()
    picks, far = farthest_first(pool, torch.tensor([one]).double(), 5)
    assert picks.tolist() == [2, 3, 4, 1, 0]
    expected = [math.sqrt(2), math.sqrt(2), 0.808332, 0.141421, 0.0]
    assert far.tolist() == pytest.approx(expected, abs=1e-6)


def by_full_matrix(pool: Tensor, labelled: Tensor, count: int) -> list[int]:
    """Every distance anew at every pick."""
    picks: list[int] = []
    for _ in range(min(count, len(pool))):
        centres = torch.cat([labelled, pool[picks]])
        d = (pool.unsqueeze(1) - centres).square().sum(-1).sqrt().amin(1)
        d[picks] = -1.0
        picks.append(int(d.argmax()))
    return picks


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(0, 5), st.integers(0, 45))
def test_running_minima_are_the_full_matrix(seed: int, rows: int, known: int, count: int) -> None:
    pool, labelled = simplex(seed, rows), simplex(seed + 1, max(known, 1))
    picks, far = farthest_first(pool, labelled, count)
    assert picks.tolist() == by_full_matrix(pool, labelled, count)
    assert len(set(picks.tolist())) == len(picks) == min(rows, count)
    assert (far.diff() <= 1e-12).all()
    assert (far <= math.sqrt(2) + 1e-12).all()


def test_permuting_classes_or_repeating_a_labelled_point_changes_nothing() -> None:
    pool, labelled = simplex(0, 30), simplex(1, 4)
    picks = farthest_first(pool, labelled, 8)[0].tolist()
    order = torch.tensor([2, 0, 3, 1])
    assert farthest_first(pool[:, order], labelled[:, order], 8)[0].tolist() == picks
    assert farthest_first(pool, torch.cat([labelled, labelled[:2]]), 8)[0].tolist() == picks
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    moved = shuffled[farthest_first(pool[shuffled], labelled, 8)[0]]
    assert moved.tolist() == picks


@pytest.mark.parametrize("seed", range(5))
def test_the_cover_is_within_twice_the_best(seed: int) -> None:
    pool, labelled = simplex(seed, 10), simplex(seed + 50, 2)

    def radius(picks: list[int]) -> float:
        return distance_to_set(pool, torch.cat([labelled, pool[picks]])).max().item()

    best = min(radius(list(chosen)) for chosen in itertools.combinations(range(10), 3))
    greedy = radius(farthest_first(pool, labelled, 3)[0].tolist())
    assert best <= greedy <= 2 * best + 1e-12


def test_distances_do_not_depend_on_chunks_and_nothing_is_infinitely_far() -> None:
    pool, labelled = simplex(0, 2500), simplex(1, 7)
    expected = (pool.unsqueeze(1) - labelled).square().sum(-1).sqrt().amin(1)
    assert torch.allclose(distance_to_set(pool, labelled), expected, atol=1e-12)
    assert torch.isinf(distance_to_set(pool, labelled[:0])).all()
    assert len(farthest_first(pool[:0], labelled, 3)[0]) == 0


def test_the_baselines() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.8, 0.2]]).double()
    assert entropy(p).tolist() == pytest.approx([0.0, math.log(2), 0.500402], abs=1e-6)
    pool, labelled = {"p": p}, {"p": p[:1]}
    picks = {s: select(s, pool, labelled, 2, torch.Generator()).tolist() for s in ("entropy", "nearest")}
    assert picks == {"entropy": [1, 2], "nearest": [0, 2]}
    drawn = select("random", pool, labelled, 9, torch.Generator().manual_seed(1))
    assert sorted(drawn.tolist()) == [0, 1, 2]
