"""Attention transfer: closed forms and what it must not see (the authors' numbers are oracles)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kd_plugin_classics.at import at_loss, attention_map
from torch import Tensor

Wave = Callable[..., Tensor]


def test_pooling_is_symmetric(wave: Wave) -> None:
    large, small = wave(2, 2, 4, 4, phase=0.3), wave(2, 3, 2, 2, phase=1.1)
    torch.testing.assert_close(at_loss(small, large), at_loss(large, small))


def test_paper_on_disjoint_maps() -> None:
    """Unit vectors at a right angle are sqrt(2) apart: sqrt(2) / 2, over 4 positions."""
    student, teacher = torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2)
    student[0, :, 0, 0], teacher[0, :, 1, 1] = -5.0, 2.0
    assert at_loss(student, teacher).item() == pytest.approx(math.sqrt(2) / 2 / 4, rel=1e-6)


def test_attention_map_by_hand() -> None:
    feature = torch.tensor([[[[1.0, -2.0]], [[2.0, 0.0]]]])  # two channels, one row of two positions
    expected = torch.tensor([[5.0, 4.0]]) / math.sqrt(41)
    torch.testing.assert_close(attention_map(feature), expected)
    torch.testing.assert_close(attention_map(feature, power=1.0), torch.tensor([[3.0, 2.0]]) / math.sqrt(13))


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_sees_neither_scale_nor_channels(wave: Wave, variant: str) -> None:
    s, t = wave(3, 4, 3, 3, phase=0.3), wave(3, 2, 3, 3, phase=1.1)
    loss = at_loss(s, t, variant=variant)
    torch.testing.assert_close(at_loss(-7 * s[:, [2, 0, 3, 1]], 0.1 * t, variant=variant), loss)
    assert (loss > 0).all()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_zero_at_the_teacher_with_a_finite_gradient(wave: Wave, variant: str) -> None:
    s = wave(2, 3, 2, 2).requires_grad_()
    loss = at_loss(s, s.detach(), variant=variant)
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert s.grad.isfinite().all()


def test_no_gradient_to_the_teacher(wave: Wave) -> None:
    s, t = wave(2, 3, 2, 2).requires_grad_(), wave(2, 3, 2, 2, phase=2.0).requires_grad_()
    at_loss(s, t).sum().backward()
    assert t.grad is None
    assert s.grad.abs().max() > 0
