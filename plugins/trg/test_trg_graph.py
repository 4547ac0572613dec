"""TRG's terms: oracles, the card's closed forms, invariances, and the ways in which implementations go wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_trg.graph import (
    context,
    contextual_loss,
    global_loss,
    local_loss,
    neighbours,
    squared_distances,
    token_graph,
    unit,
)
from kd_plugin_trg.oracle import ORACLES
from torch import Tensor

from kdcore.testing import Oracle, check_oracle


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> Tensor:
    q: Tensor = torch.linalg.qr(normal(9, size, size))[0]
    return q


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


# ---- the graph ------------------------------------------------------------------------------------------


def test_two_tokens_tell_the_directions_of_kl_apart() -> None:
    """Teacher at distance 1, student at distance 2, k = 1, sigma = 1: KL(S||T) 0.05418 over both rows, not 0.05265."""
    teacher, student = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    assert token_graph(teacher, k=1)[0, 1].item() == pytest.approx(0.60653, abs=1e-5)
    assert token_graph(student, k=1)[0, 1].item() == pytest.approx(0.13534, abs=1e-5)
    assert local_loss(student, teacher, k=1).sum().item() == pytest.approx(0.05418, abs=1e-5)
    assert local_loss(teacher, student, k=1).sum().item() == pytest.approx(0.05265, abs=1e-5)


def test_neighbours_are_a_columns_choice_and_not_mutual() -> None:
    """0, 1 and 3 on a line, k = 1: 1 is nearest to 0 and to 3, 0 is nearest to 1; nobody is nearest to itself."""
    found = neighbours(squared_distances(torch.tensor([[0.0], [1.0], [3.0]])), 1)
    assert found.tolist() == [[False, True, False], [True, False, True], [False, False, False]]
    assert neighbours(squared_distances(normal(0, 5, 2)), 99).sum() == 5 * 4


def test_rows_of_disjoint_neighbours() -> None:
    """8 neighbours at value 1 of 64 on one side, 8 others on the other: 0.1768 a node is the most for that pattern."""
    a, b = torch.zeros(64), torch.zeros(64)
    a[:8], b[8:16] = 1.0, 1.0
    kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum")
    assert kl.item() == pytest.approx(0.1768, abs=1e-4)
    far = torch.cat([100.0 * torch.eye(8).repeat_interleave(9, 0)[:64]])
    near = torch.cat([100.0 * torch.eye(8).repeat(9, 1)[:64]])
    assert local_loss(far, near, k=8).max() <= 0.1769 * 1.01


def test_identical_tokens_are_at_zero_and_the_teacher_gets_nothing() -> None:
    s, t = normal(1, 12, 4).requires_grad_(), normal(1, 12, 4).requires_grad_()
    assert local_loss(s, t, k=3).abs().max() < 1e-12
    assert contextual_loss(s.view(3, 4, 4), t.view(3, 4, 4)).abs().max() < 1e-15
    other = normal(2, 12, 4).requires_grad_()
    total = local_loss(other, t, k=3).sum() + global_loss(other, t).sum()
    (total + contextual_loss(other.view(3, 4, 4), t.view(3, 4, 4)).sum()).backward()
    assert t.grad is None
    assert other.grad is not None
    assert other.grad.abs().sum() > 0


def test_what_the_terms_do_not_see() -> None:
    """A is unchanged by a rotation and a shift, CS by a rotation; not by a shift or a scale."""
    x, r = normal(3, 20, 6), rotation(6)
    torch.testing.assert_close(token_graph(x @ r + 5, k=4), token_graph(x, k=4))
    images = x.view(4, 5, 6)
    torch.testing.assert_close(context(images @ r), context(images))
    assert (context(images + 1) - context(images)).abs().max() > 1e-2
    assert (context(2 * images) - context(images)).abs().max() > 1e-2


def test_the_order_of_tokens_does_not_matter_when_both_sides_keep_it() -> None:
    s, t, order = (
        normal(4, 10, 3),
        normal(5, 10, 7),
        torch.randperm(10, generator=torch.Generator().manual_seed(0)),
    )
    torch.testing.assert_close(local_loss(s[order], t[order], k=3), local_loss(s, t, k=3)[order])
    assert not torch.allclose(local_loss(s[order], t, k=3), local_loss(s, t, k=3))


def test_raw_tokens_of_many_numbers_have_no_graph() -> None:
    """Squared distances in the tens: exp underflows and the term is dead. Unit tokens are why it lives."""
    s, t = normal(6, 64, 24), normal(7, 64, 24)
    assert local_loss(s, t, k=8).mean() < 1e-4
    assert local_loss(unit(s), unit(t), k=8).mean() > 1e-2


def test_no_gradient_passes_through_the_choice_of_neighbours() -> None:
    """With the choice held fixed, differences of the kernel alone give the gradient."""
    s, t, k = normal(8, 7, 3).requires_grad_(), normal(9, 7, 3), 2
    (grad,) = torch.autograd.grad(local_loss(s, t, k=k).sum(), s)
    chosen = neighbours(squared_distances(s), k)

    def value(x: Tensor) -> float:
        d = (x[:, None] - x[None]).square().sum(-1)
        log_s = torch.where(chosen, torch.exp(-d / 2), 0.0).log_softmax(-1)
        return float((log_s.exp() * (log_s - token_graph(t, k=k).log_softmax(-1))).sum())

    with torch.no_grad():
        for i, j in ((0, 0), (3, 1), (6, 2)):
            step = torch.zeros_like(s)
            step[i, j] = 1e-6
            assert grad[i, j].item() == pytest.approx((value(s + step) - value(s - step)) / 2e-6, abs=1e-8)


# ---- context, InfoNCE, unit length ----------------------------------------------------------------------


def test_context_by_hand() -> None:
    cs = context(torch.eye(2)[None])
    assert cs[0].flatten().tolist() == pytest.approx([0.6698, 0.3302, 0.3302, 0.6698], abs=1e-4)
    assert contextual_loss(torch.eye(2)[None], torch.zeros(1, 2, 2)).item() == pytest.approx(
        0.02882, abs=1e-5
    )


def test_infonce_by_hand() -> None:
    eye = torch.eye(4)
    assert global_loss(eye, eye, tau=1.0).mean().item() == pytest.approx(0.74367, abs=1e-5)
    assert global_loss(eye, eye, tau=0.1).mean().item() == pytest.approx(1.4e-4, rel=0.05)
    same = torch.ones(4, 3)
    for tau in (0.1, 1.0, 7.0):
        assert global_loss(same, same, tau=tau).mean().item() == pytest.approx(math.log(4), abs=1e-6)


def test_unit_is_the_direction_and_a_blank_token_has_a_bounded_gradient() -> None:
    x = normal(10, 30, 5)
    torch.testing.assert_close(unit(x), F.normalize(x, dim=-1))
    torch.testing.assert_close(unit(1e3 * x), unit(x))
    blank = torch.cat([torch.zeros(10, 5), x[:20].float()]).requires_grad_()
    assert unit(blank)[:10].abs().max() == 0
    (grad,) = torch.autograd.grad(local_loss(unit(blank), unit(normal(11, 30, 5).float()), k=4).sum(), blank)
    assert grad.isfinite().all()
    assert grad[:10].abs().max() < 100 * grad[10:].abs().max()
    assert unit(torch.zeros(3, 2)).isfinite().all()
