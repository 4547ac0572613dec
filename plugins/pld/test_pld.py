"""PLD: oracles, a float64 rebuild from the definition on many samples, and the limits that the paper states."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_pld.loss import pld_loss, preference_order
from kd_plugin_pld.oracle import ORACLES
from torch import Tensor

import kdcore
from kdcore import InputError
from kdcore.testing import Oracle, check_oracle

SEEDS = range(5)


def brute_force(s: list[float], t: list[float], y: int, tau: float) -> float:
    """The definition in Python floats: choose class after class among those that are left."""
    order = [y, *sorted((c for c in range(len(t)) if c != y), key=lambda c: -t[c])]
    weights = [math.exp(v / tau) for v in t]
    total = 0.0
    for k, choice in enumerate(order):
        left = sum(math.exp(s[c]) for c in order[k:])
        total += weights[choice] / sum(weights) * -math.log(math.exp(s[choice]) / left)
    return total


def sample(seed: int, rows: int = 6, classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(rows, classes, generator=rng, dtype=torch.float64) for _ in range(2))
    return s, t, torch.randint(classes, (rows,), generator=rng)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# ---- values --------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_definition(seed: int, tau: float) -> None:
    s, t, y = sample(seed)
    expected = [brute_force(a, b, int(c), tau) for a, b, c in zip(s.tolist(), t.tolist(), y, strict=True)]
    torch.testing.assert_close(
        pld_loss(s, t, y, temperature=tau), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


def test_order_is_label_then_teacher() -> None:
    order = preference_order(row(0.0, 3.0, 1.0, 2.0), torch.tensor([2]))
    assert order.tolist() == [[2, 1, 3, 0]]


def test_ties_keep_the_order_of_classes() -> None:
    assert preference_order(torch.zeros(1, 40), torch.tensor([7])).tolist() == [[7, *range(7), *range(8, 40)]]


# ---- limits -----------------------------------------------------------------------------------------


def test_infinite_temperature_is_listmle() -> None:
    loss = pld_loss(row(1, 0, -1), row(0, 2, 1), torch.tensor([0]), temperature=1e9)
    assert loss.item() == pytest.approx(0.24029, abs=5e-6)


def test_listmle_is_a_distribution_over_rankings() -> None:
    """C times the limit is -log P(ranking), and the probabilities of all 4! rankings sum to 1."""
    s = row(0.3, -1.2, 2.0, 0.7)
    whole = 0.0
    for ranking in itertools.permutations(range(4)):
        t = torch.empty(1, 4, dtype=torch.float64)
        t[0, list(ranking)] = torch.arange(4, 0, -1, dtype=torch.float64)
        whole += math.exp(-4 * pld_loss(s, t, torch.tensor([ranking[0]]), temperature=1e12).item())
    assert whole == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_sure_and_right_teacher_gives_cross_entropy(seed: int) -> None:
    s, t, _ = sample(seed)
    y = t.argmax(-1)
    torch.testing.assert_close(pld_loss(s, t, y, temperature=1e-9), F.cross_entropy(s, y, reduction="none"))


def test_sure_and_wrong_teacher_drops_the_label() -> None:
    """Only step 2 is left: the teacher's class against the remaining ones."""
    loss = pld_loss(row(1, 0, -1), row(0, 2, 1), torch.tensor([0]), temperature=1e-3)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-9)


@pytest.mark.parametrize("gap", [0.5, 1.0, 5.0, 50.0])
def test_falls_with_the_students_gaps(gap: float) -> None:
    """Student logits that fall by ``gap`` along the order: every suffix is a geometric series."""
    t, y = sample(0, rows=1)[1:]
    order, alpha = preference_order(t, y), t.softmax(-1)
    s = torch.empty_like(t).scatter(-1, order, -gap * torch.arange(10, dtype=torch.float64).unsqueeze(0))
    steps = [math.log(sum(math.exp(-gap * j) for j in range(10 - k))) for k in range(10)]
    expected = sum(a * step for a, step in zip(alpha.gather(-1, order)[0].tolist(), steps, strict=True))
    assert pld_loss(s, t, y).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


# ---- properties -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_invariances(seed: int) -> None:
    s, t, y = sample(seed)
    loss = pld_loss(s, t, y)
    torch.testing.assert_close(pld_loss(s + 3.0, t - 7.0, y), loss, rtol=1e-12, atol=1e-12)
    shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(pld_loss(s[:, shuffle], t[:, shuffle], shuffle.argsort()[y]), loss)
    assert not torch.allclose(pld_loss(2 * s, t, y), loss)


@pytest.mark.parametrize("seed", SEEDS)
def test_convex_in_the_student(seed: int) -> None:
    (a, t, y), (b, _, _) = sample(seed), sample(seed + 100)
    middle = pld_loss((a + b) / 2, t, y)
    assert (middle <= (pld_loss(a, t, y) + pld_loss(b, t, y)) / 2).all()


def test_gradient_stays_with_the_student() -> None:
    s, t, y = sample(0)
    s.requires_grad_(), t.requires_grad_()
    loss = pld_loss(s, t, y)
    loss.sum().backward()
    assert t.grad is None
    assert s.grad is not None
    torch.testing.assert_close(s.grad.sum(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (loss >= 0).all()


def test_self_distillation_does_not_train_the_weights() -> None:
    """Teacher and student share one tensor: the weights alpha are still constants."""
    s, _, y = sample(1)
    shared, apart = s.clone().requires_grad_(), s.clone().requires_grad_()
    pld_loss(shared, shared, y).sum().backward()
    pld_loss(apart, s, y).sum().backward()
    torch.testing.assert_close(shared.grad, apart.grad, rtol=0, atol=0)


def test_dense_rows_and_ignored_labels() -> None:
    s, t, y = sample(2)
    dense = pld_loss(s.view(2, 3, 10), t.view(2, 3, 10), y.view(2, 3))
    torch.testing.assert_close(dense, pld_loss(s, t, y).view(2, 3), rtol=0, atol=0)
    s.requires_grad_()
    y[4] = -100
    loss = pld_loss(s, t, y)
    loss.sum().backward()
    assert loss[4] == 0
    assert s.grad is not None
    assert s.grad[4].abs().max() == 0
    assert (loss[:4] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    s, t, y = sample(3)
    low = pld_loss(s.to(dtype), t.to(dtype), y)
    assert low.dtype == torch.float32
    torch.testing.assert_close(
        low.double(), pld_loss(s.to(dtype).double(), t.to(dtype).double(), y), rtol=1e-5, atol=1e-6
    )


def test_large_logits_stay_finite() -> None:
    s, t, y = (x * 1e4 if x.is_floating_point() else x for x in sample(4))
    s.requires_grad_()
    loss = pld_loss(s, t, y)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_soft_labels_are_refused() -> None:
    s, t, _ = sample(0)
    with pytest.raises(TypeError, match="hard labels"):
        pld_loss(s, t, t.softmax(-1))


# ---- as a component ---------------------------------------------------------------------------------


def test_component() -> None:
    loss = kdcore.build("loss", "pld", temperature=4.0)
    assert loss.wants() == ("student.logits", "teacher.logits")
    assert (loss.hard_term, loss.t_squared) == (True, False)
    with pytest.raises(InputError, match="out of range"):
        kdcore.build("loss", "pld", temperature=0.0)


def test_recipe_trains_with_the_one_term(tmp_path: Path) -> None:
    result = kdcore.run(
        "pld:digits", out=tmp_path / "run", overrides=["train.epochs=2", "teacher.main.train.epochs=1"]
    )
    assert [term["term"] for term in result.results["student"]["guards"]["terms"]] == ["pld"]
    assert result.results["student"]["steps"] == 8
    assert set(result.results["test"]) == {"main", "baseline", "student"}
