"""DKD against the authors' code, and the identity that it was derived from.

Numbers: megvii-research/mdistiller at a08d46f1, mdistiller/distillers/DKD.py, run once in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_classics.dkd import dkd_loss
from torch import Tensor

Wave = Callable[..., Tensor]
Y = torch.tensor([2, 0, 3])
# fmt: off
RELEASED = [  # alpha, beta, temperature, value, gradient at the student's logits
    (1.0, 8.0, 4.0, 8.26833688079, [
        -1.398169122, 1.589328169, 0.107098545, -0.2982575917, -0.1306040691, 1.709978869,
        0.5607605861, -2.140135386, -1.120145473, 1.349030873, -0.06182447497, -0.1670609251,
    ]),
    (1.0, 0.0, 1.0, 0.182788114376, [
        -0.002772463963, -0.009462067229, 0.01256184597, -0.0003273147783, -0.1006719732, 0.08354026517,
        0.004464257145, 0.01266745091, 0.09235036408, 0.01639673043, 0.001789660226, -0.1105367547,
    ]),
    (0.0, 1.0, 1.0, 0.760643020861, [
        -0.1947558954, 0.2005004244, 0.0, -0.005744529072, 0.0, 0.2293070489,
        0.01022085627, -0.2395279052, -0.04769810647, 0.04564230948, 0.002055796995, 0.0,
    ]),
]
# fmt: on


@pytest.fixture
def logits(wave: Wave) -> tuple[Tensor, Tensor]:
    return wave(3, 4, phase=0.3, scale=2.0), wave(3, 4, phase=1.1, scale=3.0)


@pytest.mark.parametrize("alpha, beta, temperature, value, gradient", RELEASED)
def test_released_value_and_gradient(
    logits: tuple[Tensor, Tensor],
    alpha: float,
    beta: float,
    temperature: float,
    value: float,
    gradient: list[float],
) -> None:
    s, t = logits[0].requires_grad_(), logits[1]
    loss = dkd_loss(s, t, Y, alpha=alpha, beta=beta, temperature=temperature).mean()
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(
        s.grad.flatten(), torch.tensor(gradient, dtype=torch.float64), rtol=1e-8, atol=1e-10
    )


def test_defaults_are_the_released_ones(logits: tuple[Tensor, Tensor]) -> None:
    assert dkd_loss(*logits, Y).mean().item() == pytest.approx(RELEASED[0][3], rel=1e-10)


def test_plain_kd_is_the_coupled_form(logits: tuple[Tensor, Tensor]) -> None:
    """KL(p || q) = TCKD + (1 - p_y) NCKD (Eq. 5 to 6), row by row."""
    s, t = logits
    whole = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="none").sum(1)
    tied = [
        dkd_loss(
            s[i : i + 1], t[i : i + 1], Y[i : i + 1], beta=1 - float(t[i].softmax(0)[Y[i]]), temperature=1.0
        )
        for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(tied), whole)


def test_zero_at_the_teacher_and_for_ignored_labels(logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    assert dkd_loss(t, t, Y).abs().max() < 1e-12
    loss = dkd_loss(s, t, torch.tensor([2, -100, 3]))
    assert (loss > 0).tolist() == [True, False, True]


def test_no_gradient_to_the_teacher(logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits[0].requires_grad_(), logits[1].requires_grad_()
    dkd_loss(s, t, Y).sum().backward()
    assert t.grad is None
