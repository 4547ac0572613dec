"""DisWOT's search: the space and its evolution, what the stage keeps and refuses, the student that is built after it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kd_plugin_diswot.demo import choices, orders, tau
from kd_plugin_diswot.models import small_net
from kd_plugin_diswot.s1 import DEPTHS, accuracies, concordance, pieces
from kd_plugin_diswot.search import Search
from kd_plugin_diswot.space import Arch, costs, every, evolve, fitness, mutated, name_of
from torch import nn

import kdcore
from kdcore import Batch, InputError
from kdcore import recipe as recipes
from kdcore.shipping import load_student

SPACE: dict[str, list[Any]] = {"depth": [1, 2, 3], "kernel": [1, 3, 5], "skip": [False, True], "only": [7]}
START: Arch = {"depth": 1, "kernel": 3, "skip": False, "only": 7}


# ---- the space --------------------------------------------------------------------------------------


def test_every_combination_once() -> None:
    found = [name_of(arch) for arch in every(SPACE)]
    assert len(found) == len(set(found)) == 18


def test_a_mutation_moves_that_many_arguments_to_other_choices() -> None:
    rng, before = np.random.default_rng(0), dict(START)
    for _ in range(50):
        one = mutated(START, SPACE, 1, rng)
        assert sum(one[name] != START[name] for name in SPACE) == 1
        two = mutated(START, SPACE, 2, rng)
        assert sum(two[name] != START[name] for name in SPACE) <= 2  # the same may be drawn twice
        assert all(two[name] in choices for name, choices in SPACE.items())
    assert before == START


def test_costs_of_a_linear_layer_and_a_convolution() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 10)

        def forward(self, batch: Batch) -> torch.Tensor:
            said: torch.Tensor = self.fc(self.norm(self.conv(batch["input"])).mean((2, 3)))
            return said

    net = Two()
    found = costs(net, Batch({"id": torch.tensor([0]), "input": torch.zeros(1, 1, 8, 8)}))
    assert found["parameters"] == 4 * 9 + 4 + 8 + 4 * 10 + 10
    assert found["flops"] == 2 * 64 * 4 * 9 + 2 * 4 * 10  # two a multiply-add
    assert found["layers"] == 2
    assert net.training
    assert int(net.norm.num_batches_tracked) == 0


def test_fitness() -> None:
    M_r, M_s = [1e-4, 3e-4, 2e-4, 2e-4], [0.5, 0.1, 0.3, 0.9]
    assert fitness(M_r, M_s, "sum") == pytest.approx([-0.5001, -0.1003, -0.3002, -0.9002])
    assert fitness(M_r, M_s, "relation") == [-r for r in M_r]
    assert fitness(M_r, M_s, "semantic") == [-s for s in M_s]
    # shares below, ties by half: relation 1/8, 7/8, 1/2, 1/2; semantic 5/8, 1/8, 3/8, 7/8
    assert fitness(M_r, M_s, "ranks") == pytest.approx([-6 / 8, -8 / 8, -7 / 8, -11 / 8])


def evolved(
    iterations: int, population: int = 512, seed: int = 0, refused: int = 99
) -> tuple[list[Arch], list[Any]]:
    """What was offered, in order, and what was dropped; architectures of depth ``refused`` may not join."""
    offered: list[Arch] = []
    dropped: list[Any] = []

    def offer(arch: Arch) -> bool:
        offered.append(arch)
        return bool(arch["depth"] != refused)

    def worst(pool: list[Arch]) -> int:
        index = max(range(len(pool)), key=lambda i: pool[i]["depth"])
        dropped.append((pool[index]["depth"], [arch["depth"] for arch in pool]))
        return index

    space = {**SPACE, "depth": list(range(1, 20))}
    how = {"iterations": iterations, "population": population}
    evolve(space, START, offer, worst, rng=np.random.default_rng(seed), **how)
    return offered, dropped


def test_evolution_begins_at_the_start_and_offers_each_architecture_once() -> None:
    offered, _ = evolved(200)
    assert offered[0] == START
    names = [name_of(arch) for arch in offered]
    assert len(names) == len(set(names)) > 40
    changes = [sum(arch[name] != START[name] for name in SPACE) for arch in offered]
    assert set(changes[1:11]) == {1}  # the pool is small
    assert max(changes) > 2  # children of children
    assert evolved(200)[0] == offered
    assert evolved(200, seed=1)[0] != offered


def test_a_full_pool_loses_its_worst() -> None:
    _, dropped = evolved(200, population=12)
    assert len(dropped) > 20
    assert all(len(pool) == 13 and worst == max(pool) for worst, pool in dropped)


def test_what_may_not_join_the_pool_has_no_children() -> None:
    offered, _ = evolved(300, refused=1)  # the start and all of its depth
    assert offered[0]["depth"] == 1
    assert any(arch["depth"] != 1 for arch in offered)
    # while nothing or little is in the pool, the start itself is mutated
    assert sum(arch[name] != START[name] for arch in offered[1:8] for name in SPACE) == 7


# ---- the stage --------------------------------------------------------------------------------------


def tree_of(**search: Any) -> dict[str, Any]:
    """The recipe, cut short, with other parameters of its search."""
    tree: dict[str, Any] = copy.deepcopy(recipes.read("diswot:digits", ["train.epochs=1"]).tree)
    tree["teacher"]["main"]["train"] = {"epochs": 1}
    small = {"hidden": [8, 13], "kernel": [1, 3], "pool": ["early", "late"]}
    tree["stage"][0] |= {"space": small, "draws": 2, "batch_size": 32, **search}
    return tree


def searched(folder: Path, **search: Any) -> list[dict[str, Any]]:
    """The history of a run of the search alone."""
    tree = tree_of(**search)
    del tree["stage"][1:]
    kdcore.run(tree, out=folder)
    rows: list[dict[str, Any]] = json.loads((folder / "stages/search/history.json").read_text("utf-8"))
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of both stages."""
    folder = tmp_path_factory.mktemp("diswot") / "run"
    kdcore.run(tree_of(), out=folder)
    return folder


def history(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "stages/search/history.json").read_text("utf-8"))
    return rows


def test_the_student_that_is_trained_is_the_best_within_the_budget(finished: Path) -> None:
    rows = history(finished)
    within = [row for row in rows if row["refused"] is None]
    assert len(rows) == 8
    assert 0 < len(within) < 8
    for row in rows:
        assert (2450 <= row["costs"]["parameters"] <= 2850) == (row["refused"] is None)
    best = min(within, key=lambda row: row["relation"] + row["semantic"])
    assert all(row["score"] == pytest.approx(-(row["relation"] + row["semantic"])) for row in within)
    student, run = load_student(finished)
    args = {"depth": 1, "skip": True, **best["arch"]}
    assert run.recipe.student.params["args"] == "@search.args"
    assert sum(p.numel() for p in student.parameters()) == best["costs"]["parameters"]
    assert {name: tuple(p.shape) for name, p in student.model.named_parameters()} == {
        name: tuple(p.shape) for name, p in small_net(**args).named_parameters()
    }
    results = json.loads((finished / "results.json").read_text("utf-8"))
    assert results["search"]["arch"] == best["arch"]
    assert (results["search"]["candidates"], results["search"]["refused"]) == (8, 8 - len(within))


def test_the_same_seed_searches_alike_and_moves_no_random_number_of_the_training(
    finished: Path, tmp_path: Path
) -> None:
    assert searched(tmp_path / "again") == history(finished)
    plain = tree_of()
    del plain["stage"]
    plain["student"]["args"] = {"depth": 1, "skip": True, **max(history(finished), key=_score)["arch"]}
    kdcore.run(plain, out=tmp_path / "plain")
    file = "student.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (finished / file).read_bytes()


def _score(row: dict[str, Any]) -> float:
    return -math.inf if row["score"] is None else float(row["score"])


def test_evolution_keeps_to_the_budget(tmp_path: Path) -> None:
    layers = {"at_least": {}, "at_most": {"layers": 4}}
    space = {"depth": [1, 2, 3], "kernel": [1, 3], "pool": ["early", "late"]}
    rows = searched(tmp_path / "run", space=space, iterations=20, **layers)
    assert 4 < len(rows) <= 12
    assert rows[0]["arch"] == {"depth": 1, "kernel": 3, "pool": "early"}  # as student.args says
    assert all((row["arch"]["depth"] == 1) == (row["refused"] is None) for row in rows)
    chosen = json.loads((tmp_path / "run/stages/search/artefacts.json").read_text("utf-8"))["args"]
    assert chosen == {"hidden": 12, "skip": True, **max(rows, key=_score)["arch"]}


def test_candidates_that_cannot_be_scored_are_passed_over(tmp_path: Path) -> None:
    free = {"at_least": {}, "at_most": {}}
    rows = searched(tmp_path / "some", space={"features": [16, 32], "kernel": [3, 4]}, **free)
    assert [row["refused"] is None for row in rows] == [False, False, True, False]
    assert "different shapes" in rows[0]["refused"]
    assert rows[0]["relation"] is None
    relation = searched(tmp_path / "relation", space={"features": [16, 32]}, score="relation", **free)
    assert all(row["refused"] is None and row["semantic"] is None for row in relation)
    with pytest.raises(InputError, match="no architecture of the space could be scored"):
        searched(tmp_path / "none", space={"features": [16, 24]}, **free)


def test_untrained_means_untrained_and_initialisations_differ(tmp_path: Path) -> None:
    scores = {
        init: [row["semantic"] for row in searched(tmp_path / init, init=init, variant="paper")]
        for init in ("gaussian", "default")
    }
    assert scores["gaussian"] != scores["default"]


@pytest.mark.parametrize(
    ("search", "problem"),
    [({"space": {"kernel": [3]}}, "nothing to choose"), ({"like": "other"}, "which teacher")],
)
def test_what_makes_no_search_is_refused(tmp_path: Path, search: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        searched(tmp_path / "run", **search)
    assert Search(space={"kernel": [1, 3]}).iterations is None


# ---- the demonstration ------------------------------------------------------------------------------


def test_kendalls_tau() -> None:
    assert tau([1, 2, 3], [10, 20, 30]) == 1
    assert tau([1, 2, 3], [3, 2, 1]) == -1
    assert tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    # tied: 3 pairs, two of them ordered in x, all in y, both concordant
    assert tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))


def test_the_tables_rows() -> None:
    terms = ("sum", "ranks", "relation", "semantic")
    found = {f"{variant} {term}": [1.0, 2.0, 3.0] for variant in ("released", "paper") for term in terms}
    found |= {
        "parameters": [3, 2, 1],
        "flops": [1, 3, 2],
        "kd test": [0.7, 0.9, 0.8],
    }
    found |= {"kd val": [0.1, 0.3, 0.2]}
    order, choice = orders(found), choices(found)
    assert order["DisWOT"] == pytest.approx(1 / 3)
    assert order["more operations"] == 1
    assert choice["DisWOT"] == 0.8
    assert choice["more parameters"] == 0.7
    assert choice["best on val after distillation"] == 0.9
    assert choice["random choice (mean of all)"] == pytest.approx(0.8)


def test_the_authors_accuracies_are_in_the_order_of_their_nets() -> None:
    found = dict(zip(DEPTHS, accuracies(), strict=True))
    assert max(found, key=found.__getitem__) == (5, 5, 7)
    assert [found[depths] for depths in ((1, 1, 1), (5, 5, 7), (7, 7, 7))] == [61.87, 74.86, 74.44]
    depth = [float(sum(depths)) for depths in DEPTHS]
    assert tau(depth, accuracies()) == pytest.approx(
        0.657, abs=5e-4
    )  # known from the released table, worked out apart


def test_only_pairs_of_nearly_equal_size_count() -> None:
    size, accuracy = [100.0, 110.0, 200.0], [0.1, 0.2, 0.3]
    assert concordance([1.0, 2.0, 0.0], size, accuracy) == 1
    assert concordance([2.0, 1.0, 3.0], size, accuracy) == 0


def test_pieces_are_of_the_photographs_and_repeatable() -> None:
    one, two = (pieces(6, np.random.default_rng(seed)) for seed in (0, 0))
    assert torch.equal(one, two)
    assert one.shape == (6, 3, 32, 32)
    torch.testing.assert_close(one.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert not torch.equal(one, pieces(6, np.random.default_rng(1)))
