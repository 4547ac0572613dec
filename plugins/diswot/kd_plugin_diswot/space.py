"""The space of students: an argument's choices, its mutations, what a student costs, the evolution."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdcore import Batch

Arch = dict[str, Any]
Space = Mapping[str, Sequence[Any]]
Cost = Literal["parameters", "flops", "layers"]
Score = Literal["sum", "ranks", "relation", "semantic"]
FIRST = 10  # the pool's size up to which the start is mutated, not a member


def name_of(arch: Arch) -> str:
    """Equal for equal architectures."""
    return json.dumps(arch, sort_keys=True)


def every(space: Space) -> Iterator[Arch]:
    """All architectures, in the order of the choices."""
    return (dict(zip(space, values, strict=True)) for values in itertools.product(*space.values()))


def mutated(arch: Arch, space: Space, changes: int, rng: np.random.Generator) -> Arch:
    """``changes`` arguments, drawn with replacement, each moved to another of its choices."""
    child, names = dict(arch), [name for name, choices in space.items() if len(choices) > 1]
    for _ in range(changes):
        name = names[rng.integers(len(names))]
        others = [choice for choice in space[name] if choice != child[name]]
        child[name] = others[rng.integers(len(others))]
    return child


def costs(model: nn.Module, sample: Batch) -> dict[Cost, int]:
    """Parameters, floating-point operations (two a multiply-add) of one ``sample``, convolutions and linear layers."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(sample)
    model.train(training)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": counter.get_total_flops(),
        "layers": sum(isinstance(module, kinds) for module in model.modules()),
    }


def fitness(relation: Sequence[float], semantic: Sequence[float], how: Score) -> list[float]:
    """Higher is better. ``sum``: -(M_r + M_s), as published; ``ranks``: minus the mean of the two ranks, among
    these candidates, because the two distances differ in scale by orders of magnitude."""
    terms = {"relation": [relation], "semantic": [semantic]}.get(how, [relation, semantic])
    rows = np.array([_ranks(term) if how == "ranks" else term for term in terms])
    return [-float(value) for value in rows.sum(0)]


def _ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The share of values below each, ties by half."""
    x = np.asarray(values, dtype=float)
    below, same = x[None] < x[:, None], x[None] == x[:, None]
    return (below + same / 2).mean(1)  # type: ignore[no-any-return]


def evolve(
    space: Space,
    start: Arch,
    offer: Callable[[Arch], bool],
    worst: Callable[[list[Arch]], int],
    *,
    iterations: int,
    population: int,
    rng: np.random.Generator,
) -> None:
    """The search of the released code for plain nets: offers architectures, each once.

    ``offer(arch)`` scores one and says whether it may join the pool (within the budget, and it ran). While the
    pool has at most 10 members the start is mutated in one argument, then a member, drawn uniformly, in two;
    a pool of more than ``population`` loses ``worst(pool)``, an index.
    """
    pool, known = [start] if offer(start) else [], {name_of(start)}
    for _ in range(iterations):
        if len(pool) > population:
            pool.pop(worst(pool))
        parent, changes = (start, 1) if len(pool) <= FIRST else (pool[rng.integers(len(pool))], 2)
        child = mutated(parent, space, changes, rng)
        if name_of(child) not in known:
            known.add(name_of(child))
            if offer(child):
                pool.append(child)
