"""DCD: the authors' selection (raojay7/DCD, fbb5ff0), the card of the losses in closed form, and what each part promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kd_plugin_dcd.loss import DCD, confidence, dcd_loss, entropy_share, wsl_loss
from kd_plugin_dcd.metrics import MeanRecall, recall
from kd_plugin_dcd.oracle import ORACLES, wave
from kd_plugin_dcd.select import hard_list, random_list
from torch import Tensor

from kdcore import Batch, Outputs
from kdcore.testing import Oracle, check_oracle

ZERO = torch.zeros(2, dtype=torch.int64)
Seed = st.integers(0, 10_000)


def scores(seed: int, rows: int = 4, columns: int = 8) -> Tensor:
    return 2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


# ---- selection --------------------------------------------------------------------------------------


def test_the_selection_is_the_authors() -> None:
    # the block "sample selection" of objectives.py, compute_irtr, run with hard_negative = 4; of the four rows the
    # first has its match on top, the others outside the first five
    table = torch.tensor(wave(4, 12, 0.5, 3.0))
    table[0, 0], table[1, 0] = 9.0, -9.0
    chosen = hard_list(table, torch.zeros(4, dtype=torch.int64), keep=4)
    assert chosen.tolist() == [[0, 8, 4, 1, 5], [0, 7, 11, 3, 4], [0, 10, 6, 3, 2], [0, 9, 5, 2, 1]]


@settings(max_examples=40, deadline=None)
@given(Seed, st.integers(0, 9))
def test_the_match_comes_first_and_then_the_hardest(seed: int, place: int) -> None:
    table, target = scores(seed, 3, 10), torch.full((3,), place)
    chosen = hard_list(table, target, keep=7)
    for row, values in zip(chosen.tolist(), table.tolist(), strict=True):
        others = sorted(set(range(10)) - {place}, key=lambda column: -values[column])
        assert row == [place, *others[:7]]


@settings(max_examples=20, deadline=None)
@given(Seed)
def test_the_order_of_the_negatives_does_not_matter(seed: int) -> None:
    table = scores(seed, 1, 12)
    order = torch.cat(
        [torch.tensor([0]), 1 + torch.randperm(11, generator=torch.Generator().manual_seed(seed))]
    )
    shuffled = order[hard_list(table[:, order], ZERO[:1], keep=5)]
    assert torch.equal(shuffled, hard_list(table, ZERO[:1], keep=5))


def test_random_lists_are_the_first_negatives() -> None:
    target = torch.tensor([0, 3])
    assert random_list(scores(0, 2, 6), target, keep=3).tolist() == [[0, 1, 2, 3], [3, 0, 1, 2]]


def test_a_row_may_not_be_shorter_than_what_is_kept() -> None:
    assert hard_list(scores(0, 2, 8), ZERO, keep=7).shape == (2, 8)
    with pytest.raises(ValueError, match="7 negatives, and 8 are to be kept"):
        hard_list(scores(0, 2, 8), ZERO, keep=8)


# ---- the losses -------------------------------------------------------------------------------------


def test_the_two_by_two_example() -> None:
    z, y = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    e = entropy_share(z)
    assert e.tolist() == pytest.approx([0.345149, 0.654851], abs=1e-6)
    assert confidence(e).tolist() == pytest.approx([0.576812, 0.423188], abs=1e-6)
    released = dcd_loss(y, z, ZERO, variant="released")
    assert released["match"].mean().item() == pytest.approx(0.2 * 0.25, abs=1e-6)
    assert released["labels"].mean().item() == pytest.approx(0.8 * 0.627589, abs=1e-6)
    assert sum(term.mean().item() for term in released.values()) == pytest.approx(0.552071, abs=1e-6)
    assert dcd_loss(y, z, ZERO)["match"].mean().item() == pytest.approx(0.2 * 0.288406, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(Seed)
def test_the_released_weights_cancel(seed: int) -> None:
    y, z, first = scores(seed), scores(seed + 1), torch.zeros(4, dtype=torch.int64)
    mse = torch.nn.functional.mse_loss(y, z).item()
    for weighing in ("entropy", "none"):
        said = dcd_loss(y, z, first, alpha=1.0, variant="released", weighing=weighing)
        assert said["match"].mean().item() == pytest.approx(mse, rel=1e-5)
    assert dcd_loss(y, z, first, alpha=1.0)["match"].mean().item() != pytest.approx(mse, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(Seed)
def test_weights_are_shares_of_the_batch(seed: int) -> None:
    e = entropy_share(scores(seed))
    r = confidence(e)
    assert e.sum().item() == pytest.approx(1, abs=1e-5)
    assert r.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(
        e.argsort(), r.argsort(descending=True)
    )  # sure of a list: matched more, labels count less


def test_lists_of_equal_entropy_weigh_alike() -> None:
    z, y, first = scores(3, 1).repeat(4, 1), scores(4), torch.zeros(4, dtype=torch.int64)
    assert entropy_share(z).tolist() == pytest.approx([0.25] * 4)
    assert entropy_share(1e4 * torch.eye(4)).tolist() == [0.25] * 4  # no entropy at all
    one, two, three = (
        dcd_loss(y, z, first, **how)  # type: ignore[arg-type]
        for how in ({}, {"variant": "released"}, {"weighing": "none"})
    )
    for term in one:
        assert one[term].mean().item() == pytest.approx(two[term].mean().item(), rel=1e-5)
        assert torch.allclose(one[term], three[term], rtol=1e-5)


def test_alpha_divides_between_the_terms() -> None:
    y, z, first = scores(1), scores(2), torch.zeros(4, dtype=torch.int64)
    assert not dcd_loss(y, z, first, alpha=1.0)["labels"].any()
    assert not dcd_loss(y, z, first, alpha=0.0)["match"].any()
    assert dcd_loss(z, z, first)["match"].abs().max() == 0
    assert wsl_loss(z, z, first)["match"].abs().max() == 0


def test_no_teacher_probability_that_underflows_is_not_a_number() -> None:
    z = torch.tensor([[500.0, 0.0, -500.0], [1.0, 0.0, 0.5]], requires_grad=True)
    y = torch.zeros(2, 3, requires_grad=True)
    total = sum(term.mean() for term in dcd_loss(y, z, ZERO).values())
    assert isinstance(total, Tensor)
    total.backward()
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()
    assert z.grad is None


def test_wsl_weighs_by_how_far_the_student_lags() -> None:
    z = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    y = torch.tensor(
        [[1.0, -1.0], [-1.0, 1.0]]
    )  # the same distance from z would be 1 and 5, squared and halved
    d = wsl_loss(y, z, ZERO, alpha=1.0)["match"] / torch.tensor([1.0, 5.0])
    right = 1 - torch.exp(torch.tensor(-1.0))  # cross-entropy ln(1 + e^-2) of both, so 1 - e^-1
    assert d[0].item() == pytest.approx(right.item(), rel=1e-5)
    assert d[1] > 0.99


def test_released_pairs_the_sorted_scores_of_the_selection() -> None:
    said = Outputs(torch.zeros(1, 3)), Outputs(torch.tensor([[1.0, 3.0, 2.0]]))
    batch = Batch({"id": ZERO[:1], "target": ZERO[:1]})
    loss = DCD(alpha=1.0, variant="released")
    assert loss(*said, batch)["match"].item() == pytest.approx(14 / 3)  # sorted or not: 1, 4, 9
    student = Outputs(torch.tensor([[1.0, 3.0, 2.0]]))
    assert DCD(alpha=1.0)(student, said[1], batch)["match"].item() == 0
    assert loss(student, said[1], batch)["match"].item() == pytest.approx((4 + 1 + 1) / 3)  # against 3, 2, 1
    batch["top_scores"] = torch.tensor([[4.0, 3.0, 2.0]])  # the match was not among the first three
    assert loss(student, said[1], batch)["match"].item() == pytest.approx(9 / 3)


# ---- the metric -------------------------------------------------------------------------------------


def test_recall_of_both_directions() -> None:
    table = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.5], [0.0, 0.4, 0.6]])
    own = torch.arange(3)
    assert recall(table, own) == pytest.approx((2 / 3, 2 / 3))  # row 1 prefers text 2, text 1 prefers image 0
    assert recall(table[:, [1, 0, 2]], torch.tensor([1, 0, 2])) == pytest.approx((2 / 3, 2 / 3))
    assert recall(table, own, k=2) == pytest.approx((1.0, 2 / 3))
    metric = MeanRecall()
    metric.update(table[:2], own[:2])
    metric.update(table[2:], own[2:])
    assert metric.compute().item() == pytest.approx(2 / 3)
    uneven = torch.tensor([[0.9, 0.1], [0.95, 0.2]])
    assert recall(uneven, torch.tensor([0, 1])) == (0.5, 0.5)
    assert recall(torch.tensor([[0.9, 0.1], [0.95, 0.99]]), torch.tensor([0, 1])) == (1.0, 0.5)
