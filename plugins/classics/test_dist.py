"""DIST: what a correlation must and must not see (the authors' numbers are oracles)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kd_plugin_classics.dist import dist_loss, pearson_distance
from torch import Tensor

Wave = Callable[..., Tensor]


@pytest.fixture
def logits(wave: Wave) -> tuple[Tensor, Tensor]:
    return wave(4, 3, phase=0.3, scale=2.0), wave(4, 3, phase=1.1, scale=3.0)


def test_distance_against_numpys_correlation(wave: Wave) -> None:
    import numpy as np

    a, b = wave(3, 7, phase=0.3), wave(3, 7, phase=2.2)
    expected = [1 - np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    torch.testing.assert_close(pearson_distance(a, b), torch.tensor(expected), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pearson_distance(3 * a + 2, b), pearson_distance(a, b), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pearson_distance(a, -a), torch.full((3,), 2.0, dtype=torch.float64))


def test_zero_at_the_teacher(logits: tuple[Tensor, Tensor]) -> None:
    t = logits[1]
    assert 0 <= dist_loss(t, t).item() < 1e-6
    assert dist_loss(logits[0], t).item() > 0.1


def test_equal_probabilities_are_no_nan() -> None:
    s = torch.zeros(4, 3, requires_grad=True)
    loss = dist_loss(s, torch.eye(4, 3))
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert s.grad.isfinite().all()


def test_no_gradient_to_the_teacher(logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits[0].requires_grad_(), logits[1].requires_grad_()
    dist_loss(s, t).backward()
    assert t.grad is None


def test_token_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, C\]"):
        dist_loss(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3))
