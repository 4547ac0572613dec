"""DKD: the identity that it was derived from (the authors' numbers are oracles)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_classics.dkd import dkd_loss
from torch import Tensor

Wave = Callable[..., Tensor]
Y = torch.tensor([2, 0, 3])


@pytest.fixture
def logits(wave: Wave) -> tuple[Tensor, Tensor]:
    return wave(3, 4, phase=0.3, scale=2.0), wave(3, 4, phase=1.1, scale=3.0)


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
