"""DIST against the authors' code, and what a correlation must and must not see.

Numbers: hunto/image_classification_sota at 6f7a70a1 (to which hunto/DIST_KD refers), lib/models/losses/dist_kd.py,
run once in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kd_plugin_classics.dist import dist_loss, pearson_distance
from torch import Tensor

Wave = Callable[..., Tensor]
# fmt: off
RELEASED = [  # beta, gamma, temperature, value, gradient at the student's logits
    (1.0, 0.0, 1.0, 0.465830370505, [
        -0.08232032497, 0.07048552837, 0.0118347966, -0.00264615387, -0.1491613787, 0.1518075325,
        0.001238793133, -0.00368622012, 0.002447426987, 0.1979721491, -0.001940540956, -0.1960316081,
    ]),
    (0.0, 1.0, 1.0, 0.590459334485, [
        -0.1826265289, 0.1833620098, -0.0007354809616, 0.008710692485, -0.1513553671, 0.1426446746,
        0.004103076363, -0.005513450075, 0.001410373712, 0.1560227626, 0.005526797593, -0.1615495601,
    ]),
    (2.0, 2.0, 4.0, 24.9404395047, [
        -6.410402184, 5.059333358, 1.351068826, -0.2442334293, -4.861660237, 5.105893666,
        1.390651914, -2.012084794, 0.6214328794, 6.066344595, 0.48046648, -6.546811075,
    ]),
]
# fmt: on


@pytest.fixture
def logits(wave: Wave) -> tuple[Tensor, Tensor]:
    return wave(4, 3, phase=0.3, scale=2.0), wave(4, 3, phase=1.1, scale=3.0)


@pytest.mark.parametrize("beta, gamma, temperature, value, gradient", RELEASED)
def test_released_value_and_gradient(
    logits: tuple[Tensor, Tensor],
    beta: float,
    gamma: float,
    temperature: float,
    value: float,
    gradient: list[float],
) -> None:
    s, t = logits[0].requires_grad_(), logits[1]
    loss = dist_loss(s, t, beta=beta, gamma=gamma, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(
        s.grad.flatten(), torch.tensor(gradient, dtype=torch.float64), rtol=1e-8, atol=1e-10
    )


def test_defaults_are_the_released_ones(logits: tuple[Tensor, Tensor]) -> None:
    assert dist_loss(*logits).item() == pytest.approx(1.05628970499, rel=1e-10)


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
