"""Attention transfer against the authors' normalisation as RepDistiller has it, and closed forms.

Numbers: HobbitLong/RepDistiller at b84f547c, distiller_zoo/AT.py, run once in float64. Its at_loss is that of
szagoruyko/attention-transfer at 893df548, utils.py, plus the pooling of unequal sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kd_plugin_classics.at import at_loss, attention_map
from torch import Tensor

Wave = Callable[..., Tensor]
# fmt: off
GRADIENT = [
    -0.01032743899, 0.04818968469, 0.007344324929, -0.02122927263, -0.02547502039, 0.03099863066,
    0.01219390487, -0.009841222285, -0.0339683986, 0.005710578712, 0.01385837566, 0.004117404715,
    0.005613794962, 0.00103850453, -0.009050566319, -0.003984032397, 0.004084044155, 0.00208722315,
    -0.00519969603, -0.005962512713, 0.001487520516, 0.002590748606, 9.360960196e-06, -0.006383554781,
]
# fmt: on


def test_released_value_and_gradient(wave: Wave) -> None:
    s = wave(2, 3, 2, 2, phase=0.3).requires_grad_()
    loss = at_loss(s, wave(2, 2, 2, 2, phase=1.1), variant="released").mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.0235427091483, rel=1e-10)
    torch.testing.assert_close(
        s.grad.flatten(), torch.tensor(GRADIENT, dtype=torch.float64), rtol=1e-8, atol=1e-12
    )


def test_released_pools_the_larger_map(wave: Wave) -> None:
    large, small = wave(2, 2, 4, 4, phase=0.3), wave(2, 3, 2, 2, phase=1.1)
    assert at_loss(large, small, variant="released").mean().item() == pytest.approx(
        0.0938263284689, rel=1e-10
    )
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
