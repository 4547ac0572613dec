"""TopKLD's mathematics: BitDistiller's numbers at its limits, closed forms, the warning about the raw sum."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_topkld.loss import top_mask, topkld_loss
from kd_plugin_topkld.oracle import ORACLES, wave
from torch import Tensor

from kdcore.testing import Oracle, check_oracle


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    assert check_oracle(oracle)


def logits(phase: float, *shape: int) -> Tensor:
    return torch.tensor(wave(phase, *shape), dtype=torch.float64)


def of_two(q_top: Tensor, **params: Any) -> Tensor:
    """The loss of p = (0.7, 0.3) and q = (q_top, 1 - q_top), k = 1."""
    q = torch.stack([q_top, 1 - q_top], -1)
    p = torch.tensor([0.7, 0.3], dtype=torch.float64).expand_as(q)
    return topkld_loss(q.log(), p.log(), k=1, **params)


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_corrected_is_a_divergence(k: int, variant: Literal["A", "B"]) -> None:
    t = logits(0.5, 8, 5)
    assert (topkld_loss(logits(2.0, 8, 5), t, k=k, variant=variant) > 1e-3).all()
    s = t.clone().requires_grad_()
    value = topkld_loss(s, t, k=k, variant=variant)
    assert value.detach().abs().max() < 1e-12
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("variant", "slope", "least", "where"), [("A", 0.42, -0.546, 0.179), ("B", -0.42, -0.303, 0.947)]
)
def test_the_raw_sum_is_none(variant: Literal["A", "B"], slope: float, least: float, where: float) -> None:
    """Its gradient at q = p is not 0, and its minimum is elsewhere: a student drains its main modes (A)."""
    t = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()
    s = t.clone().requires_grad_()
    value = topkld_loss(s, t, k=1, variant=variant, corrected=False)
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    (found,) = torch.autograd.grad(value.sum(), s)
    assert found[0].tolist() == pytest.approx([slope, -slope], abs=1e-9)
    grid = torch.linspace(0.001, 0.999, 1997, dtype=torch.float64)
    values = of_two(grid, variant=variant, corrected=False)
    assert values.min().item() == pytest.approx(least, abs=1e-3)
    assert grid[values.argmin()].item() == pytest.approx(where, abs=1e-3)
    corrected = of_two(grid, variant=variant)
    assert grid[corrected.argmin()].item() == pytest.approx(0.7, abs=1e-3)


def test_blind_to_constants_and_to_the_order_of_the_vocabulary() -> None:
    s, t = logits(0.0, 6, 7), logits(1.0, 6, 7)
    value = topkld_loss(s, t, k=3)
    assert torch.allclose(topkld_loss(s + 4, t - 9, k=3), value)
    order = torch.tensor([3, 6, 0, 5, 1, 2, 4])
    assert torch.allclose(topkld_loss(s[:, order], t[:, order], k=3), value)


def test_the_split_is_the_teachers_alone() -> None:
    t = torch.tensor([[0.1, 3.0, 2.0, -1.0]], dtype=torch.float64)
    assert top_mask(t, 2).tolist() == [[False, True, True, False]]
    # a student with other modes: its value is still the sum over the teacher's top two
    s = torch.tensor([[4.0, -1.0, 0.0, 2.0]], dtype=torch.float64)
    p, q = t.softmax(1)[0], s.softmax(1)[0]
    r, f = q * (q / p).log() - q + p, p * (p / q).log() - p + q
    assert topkld_loss(s, t, k=2).item() == pytest.approx((r[1] + r[2] + f[0] + f[3]).item(), rel=1e-12)


def test_ties_are_broken_by_place() -> None:
    rows = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    assert top_mask(rows, 2).tolist() == [
        [False, True, True, False, False],
        [True, True, False, False, False],
    ]
    for k in range(6):
        assert top_mask(rows, k).sum(1).tolist() == [k, k]


def test_a_top_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 5 of a vocabulary of 4"):
        topkld_loss(torch.zeros(1, 4), torch.zeros(1, 4), k=5)


def test_nothing_reaches_the_teacher_and_impossible_tokens_do_no_harm() -> None:
    s, t = logits(0.0, 3, 4).requires_grad_(), logits(1.0, 3, 4).requires_grad_()
    topkld_loss(s, t, k=2).sum().backward()
    assert t.grad is None
    padded = [F.pad(z.detach(), (0, 2), value=float("-inf")).requires_grad_() for z in (s, t)]
    value = topkld_loss(padded[0], padded[1], k=2)
    assert torch.allclose(value, topkld_loss(s, t, k=2))
    (slope,) = torch.autograd.grad(value.sum(), padded[0])
    assert s.grad is not None
    assert torch.allclose(slope[:, :4], s.grad)
    assert not slope[:, 4:].any()
