"""SinKD: the authors' numbers (2018cx/SinKD, 1ffac901), closed forms, and what a loss between sets does not see."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_sinkd.kl import SoftCrossEntropy, annealed_temperature, soft_cross_entropy
from kd_plugin_sinkd.loss import sinkd_loss, sinkhorn_distance, sinkhorn_plan
from kd_plugin_sinkd.oracle import ORACLES
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import kdcore
from kdcore import Batch, InputError, Outputs
from kdcore.shipping import load_student
from kdcore.testing import Oracle, check_oracle

NET = {"use": "module", "model": "kdcore.zoo:mlp"}
RECIPE: dict[str, Any] = {
    "data": {"source": "kdcore.datasets:digits", "args": {"labels": 40}, "batch_size": 20},
    "teacher": {"main": {**NET, "args": {"hidden": [16]}}},
    "student": {**NET, "args": {"hidden": [8]}},
    "loss": [{"use": "sinkd"}],
    "train": {"steps": 4, "optimizer": {"use": "AdamW", "lr": 1e-2}},
}


def pair(seed: int, rows: int = 8, classes: int = 4, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(rows, classes, generator=rng, dtype=torch.float64) for _ in range(2))
    return s, t


def plain_plan(cost: Tensor, epsilon: float, rounds: int) -> list[list[float]]:
    """The definition in Python floats, without logarithms."""
    plan = [[math.exp(-w / epsilon) for w in row] for row in cost.tolist()]
    for _ in range(rounds):
        plan = [[k / sum(row) for k in row] for row in plan]
        sums = [sum(row[j] for row in plan) for j in range(len(plan[0]))]
        plan = [[k / sums[j] for j, k in enumerate(row)] for row in plan]
    return plan


# ---- the transport plan -----------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("rounds", [1, 20])
def test_plan_is_the_definition(epsilon: float, rounds: int) -> None:
    cost = 2 * torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.tensor(plain_plan(cost, epsilon, rounds), dtype=torch.float64)
    torch.testing.assert_close(
        sinkhorn_plan(cost, epsilon=epsilon, rounds=rounds), expected, rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize(("a", "b", "epsilon"), [(0.2, 1.0, 0.1), (0.5, 0.4, 0.2)])
def test_two_points_in_closed_form(a: float, b: float, epsilon: float) -> None:
    """W = [[a, b], [b, a]] is balanced at once: p = 1 / (1 + exp(-(b - a) / epsilon)), L = 2 (p a + (1 - p) b)."""
    cost = torch.tensor([[a, b], [b, a]], dtype=torch.float64)
    plan = sinkhorn_plan(cost, epsilon=epsilon)
    p = 1 / (1 + math.exp(-(b - a) / epsilon))
    assert plan[0, 0].item() == pytest.approx(p, rel=1e-12)
    assert (plan * cost).sum().item() == pytest.approx(2 * (p * a + (1 - p) * b), rel=1e-12)
    if (a, b) == (0.2, 1.0):
        assert (plan * cost).sum().item() == pytest.approx(0.400537, abs=1e-6)


def test_columns_sum_to_one_and_the_rows_nearly() -> None:
    s, t = pair(0, rows=6)
    plan = sinkhorn_plan(torch.cdist(s.softmax(1), t.softmax(1), p=1))
    torch.testing.assert_close(plan.sum(0), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-14)
    assert plan.sum().item() == pytest.approx(6)
    many = sinkhorn_plan(torch.cdist(s.softmax(1), t.softmax(1), p=1), rounds=2000)
    gap, later = ((each.sum(1) - 1).abs().max() for each in (plan, many))
    assert later < 1e-4 < 1e-3 < gap < 0.2


def test_a_small_epsilon_is_the_assignment_problem() -> None:
    """As epsilon -> 0 the plan is the cheapest one-to-one pairing (scipy), where the plain kernel underflows."""
    s, t = pair(3)
    p, q = s.softmax(1), t.softmax(1)
    cost = torch.cdist(p, q, p=1)
    rows, columns = linear_sum_assignment(cost.numpy())
    found = sinkhorn_distance(p, q, epsilon=2e-3, rounds=3000).item()
    assert found == pytest.approx(cost[rows, columns].sum().item(), abs=1e-3)
    far = sinkhorn_plan(torch.full((3, 3), 2.0), epsilon=0.01)  # exp(-200) is 0 in float32
    torch.testing.assert_close(far, torch.full((3, 3), 1 / 3))


# ---- the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_it_compares_sets(seed: int) -> None:
    """Neither side's order counts, nor the names of the classes, nor a constant added to a row."""
    s, t = pair(seed)
    loss, shuffle = sinkd_loss(s, t), torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    for same in (
        sinkd_loss(s, t[shuffle]),
        sinkd_loss(s[shuffle], t),
        sinkd_loss(s[:, [2, 0, 3, 1]], t[:, [2, 0, 3, 1]]),
    ):
        torch.testing.assert_close(same, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sinkd_loss(s + torch.arange(8.0)[:, None], t - 3), loss)
    assert not torch.allclose(sinkd_loss(s, t.roll(1, dims=1)), loss)


def test_it_is_symmetric_once_the_rounds_have_converged() -> None:
    s, t = pair(1)
    gap = (sinkd_loss(s, t) - sinkd_loss(t, s)).abs()
    far = (sinkd_loss(s, t, rounds=3000) - sinkd_loss(t, s, rounds=3000)).abs()
    assert far < 1e-7 < gap < 0.05


def test_a_share_a_row_does_not_grow_with_the_batch_and_the_sum_does() -> None:
    s, t = pair(2)
    twice = torch.cat([s, s]), torch.cat([t, t])
    torch.testing.assert_close(sinkd_loss(*twice), sinkd_loss(s, t), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        sinkd_loss(*twice, variant="released"), 2 * sinkd_loss(s, t, variant="released"), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(sinkd_loss(s, t, variant="released"), 0.008 * sinkd_loss(s, t))


def test_released_ignores_the_temperature() -> None:
    s, t = pair(2)
    assert torch.equal(*(sinkd_loss(s, t, variant="released", temperature=x) for x in (1.0, 5.0)))
    assert not torch.allclose(sinkd_loss(s, t, temperature=1.0), sinkd_loss(s, t, temperature=5.0))


def test_the_entropys_bias_falls_with_epsilon() -> None:
    """Above 0 where student equals teacher, and the less so the smaller epsilon is."""
    s = pair(4)[0]
    biases = [sinkd_loss(s, s, epsilon=e, rounds=200).item() for e in (0.2, 0.1, 0.05, 0.005)]
    assert biases == sorted(biases, reverse=True)
    assert biases[0] > 0.01
    assert biases[-1] < 1e-4
    assert 0 <= sinkd_loss(*pair(5)).item() <= 2


def test_gradients() -> None:
    s, t = pair(6, rows=4, classes=3)
    s.requires_grad_(), t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkd_loss(x, t, rounds=5), [s])
    loss = sinkd_loss(s, t)
    loss.backward()
    assert t.grad is None
    assert s.grad is not None
    torch.testing.assert_close(s.grad.sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_saturated_rows_learn_next_to_nothing() -> None:
    """The distance is at its greatest, 2, and softmax lets no gradient through: about e^-20 of the scale."""
    s = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    loss = sinkd_loss(s, torch.tensor([[0.0, 40.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(2, abs=1e-6)
    assert s.grad is not None
    assert s.grad.abs().max() < 1e-8


def test_tokens_are_samples_and_masked_ones_are_not_there() -> None:
    s, t = pair(7, rows=12)
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, True, True]])
    kept = mask.flatten()
    s3, t3 = s.view(4, 3, 4).clone(), t.view(4, 3, 4).clone()
    s3[~mask] = torch.nan
    torch.testing.assert_close(sinkd_loss(s3, t3, mask), sinkd_loss(s[kept], t[kept]))
    nothing = sinkd_loss(s3, t3, torch.zeros_like(mask))
    assert nothing.item() == 0


def test_blocks_are_transport_problems_of_their_own() -> None:
    s, t = pair(8, rows=7)
    parts = [sinkd_loss(s[a:b], t[a:b]) * (b - a) for a, b in ((0, 3), (3, 6), (6, 7))]
    torch.testing.assert_close(sinkd_loss(s, t, block=3), torch.stack(parts).sum() / 7)
    torch.testing.assert_close(sinkd_loss(s, t, block=100), sinkd_loss(s, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    s, t = (x.to(dtype) for x in pair(9))
    assert sinkd_loss(s, t).dtype == torch.float32
    torch.testing.assert_close(
        sinkd_loss(s, t).double(), sinkd_loss(s.double(), t.double()), rtol=1e-4, atol=1e-5
    )


# ---- the term beside it -----------------------------------------------------------------------------


def test_soft_cross_entropy_differs_from_kl_by_the_teachers_entropy() -> None:
    s, t = pair(10)
    kl = F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="none").sum(1)
    entropy = torch.distributions.Categorical(logits=t / 3).entropy()
    torch.testing.assert_close(soft_cross_entropy(s, t, temperature=3.0), kl + entropy)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 4.0), (1, 2.5), (2, 1.0)])
def test_annealing_is_linear_in_the_epoch(epoch: int, expected: float) -> None:
    """DistillKL_anneal(4): (1 - T) / (epochs - 1) * epoch + T."""
    assert annealed_temperature(4.0, epoch, 3) == pytest.approx(expected)
    assert annealed_temperature(4.0, 0, 1) == 4.0


class Clock:
    """What the loss asks of a run."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.total_steps, self.steps_per_epoch = epoch, 30, 10


@pytest.mark.parametrize(
    ("epoch", "value"), [(0, 1.8463874461638892), (1, 2.36896304430275), (2, 4.805019739403353)]
)
def test_annealed_term_is_the_authors(epoch: int, value: float) -> None:
    """DistillKL_anneal(4) in epochs 0, 1 and 2 of 3, on the oracle's logits."""
    oracle = next(o for o in ORACLES if o.name == "the authors' module")
    s, t = (torch.from_numpy(_normal(x)) for x in oracle.tensors.values())
    loss = SoftCrossEntropy(temperature=4.0, anneal=True)
    loss.run = Clock(epoch)  # type: ignore[assignment]
    found = loss(Outputs(logits=s), Outputs(logits=t), Batch()).mean()
    assert found.item() == pytest.approx(value, rel=1e-10)


def _normal(seeded: Any) -> Any:
    import numpy as np

    return np.random.RandomState(seeded.seed).standard_normal(seeded.shape) * seeded.scale


# ---- in a run ---------------------------------------------------------------------------------------


def test_the_set_term_does_not_see_shuffled_pairs_and_kl_does(tmp_path: Path) -> None:
    """sinkd.shuffled around each: the same training with sinkd, another with kd."""

    def trained(*loss: str) -> Tensor:
        result = kdcore.run(RECIPE, out=tmp_path / "-".join(loss).replace("=", "-"), overrides=list(loss))
        student, _ = load_student(result.folder)
        return torch.cat([p.flatten() for p in student.parameters()])

    shuffled = "loss.0.use=sinkd.shuffled"
    torch.testing.assert_close(trained("loss.0.use=sinkd"), trained(shuffled, 'loss.0.loss={use="sinkd"}'))
    assert not torch.allclose(
        trained("loss.0.use=kd"), trained(shuffled, 'loss.0.loss={use="kd"}'), atol=1e-4
    )


def test_coupling_is_declared_and_accumulation_refused(tmp_path: Path) -> None:
    loss = kdcore.build("loss", "sinkd")
    assert (loss.couples_batch, loss.t_squared, loss.zero_at_teacher) == (True, False, False)
    with pytest.raises(InputError, match="accumulat"):
        kdcore.run(RECIPE, out=tmp_path / "run", overrides=["train.accumulate=2"])


def test_the_recipe_has_its_three_terms(tmp_path: Path) -> None:
    result = kdcore.run(
        "sinkd", out=tmp_path / "run", overrides=["train.epochs=2", "teacher.main.train.epochs=1"]
    )
    terms = json.loads((result.folder / "results.json").read_text())["student"]["guards"]["terms"]
    assert sorted(term["term"] for term in terms) == ["kd", "sinkd", "task"]


def test_annealing_in_a_run(tmp_path: Path) -> None:
    result = kdcore.run(
        RECIPE,
        out=tmp_path / "run",
        overrides=["loss.0.use=sinkd.kl", "loss.0.anneal=true", "loss.0.temperature=4"],
    )
    assert result.results["student"]["steps"] == 4
