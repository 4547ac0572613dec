"""TAID against the authors' code run once (SakanaAI/TAID@a062892, src/distil_losses/taid.py) and closed forms."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_taid.loss import TAIDLoss, next_t, taid_loss

import kdcore
from kdcore.functional import Unembed, chunked
from kdcore.types import Batch, Outputs

Z_S = torch.tensor(
    [
        [[0.5, -1.0, 2.0, 0.1], [1.5, 0.2, -0.3, 0.0], [0.0, 0.0, 1.0, -2.0]],
        [[-0.7, 0.9, 0.4, 1.1], [2.0, -1.0, 0.5, 0.3], [0.6, 0.6, -0.6, 0.2]],
    ]
)
Z_T = torch.tensor(
    [
        [[1.0, 0.0, -1.0, 2.0], [0.3, 1.7, 0.5, -0.9], [2.0, -1.0, 0.0, 0.4]],
        [[0.1, 0.8, -1.2, 0.5], [-0.4, 1.3, 0.9, 0.0], [1.1, -0.2, 0.7, 0.3]],
    ]
)
MASK = torch.tensor([[True, True, False], [True, False, True]])
# compute_loss(Z_S, Z_T, MASK): loss and the sum of the gradient's absolute entries
RELEASED = {
    0.0: (1.132337, 0.0),
    0.3: (1.339031, 0.304775),
    0.75: (1.611128, 0.706941),
    1.0: (1.703566, 0.851963),
}
GRADIENT_AT_03 = [-0.025758, -0.008094, 0.073851, -0.039999]  # of the first token


def masked(student: torch.Tensor, t: float, variant: Any) -> torch.Tensor:
    rows = taid_loss(student, Z_T, t=t, variant=variant)
    return torch.where(MASK, rows, 0.0).sum() / MASK.sum()


@pytest.mark.parametrize("t", RELEASED)
def test_value_and_gradient_of_the_released_code(t: float) -> None:
    student = Z_S.clone().requires_grad_()
    loss = masked(student, t, "released")
    loss.backward()
    assert student.grad is not None
    assert loss.item() == pytest.approx(RELEASED[t][0], abs=2e-6)
    assert student.grad.abs().sum().item() == pytest.approx(RELEASED[t][1], abs=2e-6)
    if t == 0.3:
        assert student.grad[0, 0].tolist() == pytest.approx(GRADIENT_AT_03, abs=2e-6)


@pytest.mark.parametrize(
    ("z_s", "z_t", "t", "cross_entropy", "kl", "gradient"),
    [
        ([0.0, 0.0], [2.0, 0.0], 0.5, 0.6931, 0.1109, -0.2311),
        ([1.0, 0.0], [-2.0, 0.0], 0.25, 0.7511, 0.0657, 0.1689),
    ],
)
def test_two_classes_by_hand(
    z_s: list[float], z_t: list[float], t: float, cross_entropy: float, kl: float, gradient: float
) -> None:
    student, teacher = torch.tensor(z_s, requires_grad=True), torch.tensor(z_t)
    assert taid_loss(student, teacher, t=t, variant="released").item() == pytest.approx(
        cross_entropy, abs=1e-4
    )
    loss = taid_loss(student, teacher, t=t)
    assert loss.item() == pytest.approx(kl, abs=1e-4)
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.tolist() == pytest.approx([gradient, -gradient], abs=1e-4)


def test_the_ends_of_the_slide() -> None:
    """t = 0: no gradient at all, and the released value is q's entropy. t = 1: plain forward KL."""
    student = Z_S.clone().requires_grad_()
    (grad,) = torch.autograd.grad(taid_loss(student, Z_T, t=0.0).sum(), student)
    assert grad.abs().max() < 1e-7
    q = F.softmax(Z_S, -1)
    assert torch.allclose(taid_loss(Z_S, Z_T, t=0.0, variant="released"), -(q * q.log()).sum(-1), atol=1e-6)
    assert torch.allclose(
        taid_loss(Z_S, Z_T, t=1.0),
        F.kl_div(F.log_softmax(Z_S, -1), F.softmax(Z_T, -1), reduction="none").sum(-1),
        atol=1e-6,
    )


def test_mixing_is_in_logit_space() -> None:
    """Mixing probabilities is another method, and gives other numbers."""
    p = 0.5 * F.softmax(Z_S, -1) + 0.5 * F.softmax(Z_T, -1)
    other = (p * (p.log() - F.log_softmax(Z_S, -1))).sum(-1)
    assert (taid_loss(Z_S, Z_T, t=0.5) - other).abs().max() > 1e-2


def test_constants_do_not_matter_and_the_teacher_gets_nothing() -> None:
    teacher = Z_T.clone().requires_grad_()
    loss = taid_loss((Z_S + 3.0).requires_grad_(), teacher - 7.0, t=0.4)
    assert torch.allclose(loss, taid_loss(Z_S, Z_T, t=0.4), atol=1e-5)
    loss.sum().backward()
    assert teacher.grad is None


def test_no_gradient_flows_through_the_target() -> None:
    """Finite differences in float64 with p_t held at its value."""
    student = Z_S[0, 0].double().requires_grad_()
    (grad,) = torch.autograd.grad(taid_loss(student, Z_T[0, 0].double(), t=0.6), student)
    with torch.no_grad():
        target = F.softmax(0.4 * Z_S[0, 0].double() + 0.6 * Z_T[0, 0].double(), -1)
        for k in range(4):
            step = torch.zeros(4, dtype=torch.float64)
            step[k] = 1e-6
            up, down = (-(target * F.log_softmax(Z_S[0, 0].double() + e, -1)).sum() for e in (step, -step))
            assert grad[k].item() == pytest.approx(((up - down) / 2e-6).item(), abs=1e-8)


LOSSES = [2.0, 1.5, 1.6, 1.2, 1.2, 0.9, 1.4, 0.8]
# update_t over LOSSES with t_start 0.2, alpha 0.05, beta 0.9 of 40 and of 4,000 steps
OFFICIAL = {
    40: [0.2, 0.22025, 0.24, 0.26, 0.28, 0.3, 0.32, 0.34],
    4000: [0.2, 0.22025, 0.2398981, 0.2592735, 0.2781187, 0.2966781, 0.3142221, 0.3316996],
}


@pytest.mark.parametrize("steps", OFFICIAL)
def test_the_schedule_of_the_released_code(steps: int) -> None:
    t, momentum, path = 0.2, 0.0, [0.2]
    for n, (previous, loss) in enumerate(itertools.pairwise(LOSSES), 1):
        t, momentum = next_t(
            t, momentum, previous, loss, progress=n / steps, t_start=0.2, alpha=0.05, beta=0.9
        )
        path.append(t)
    assert path == pytest.approx(OFFICIAL[steps], abs=1e-6)
    assert momentum == pytest.approx(0.0388591, abs=1e-6)


def test_one_update_by_hand_and_the_ceiling() -> None:
    t, momentum = next_t(0.4, 0.0, 2.0, 1.5, progress=0.0, t_start=0.4)
    assert (t, momentum) == (pytest.approx(0.40015019, abs=1e-8), pytest.approx(0.0025))
    assert next_t(0.4, 0.0, 2.0, 1.5, progress=0.0, t_start=0.4, t_end=0.45, alpha=1.0)[0] == 0.45


def test_chunked_from_hidden_states_is_the_same() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(2, 3, 5, generator=rng), torch.randn(2, 3, 6, generator=rng)
    w, v = torch.randn(9, 5, generator=rng), torch.randn(9, 6, generator=rng)
    dense = taid_loss(hidden @ w.T, theirs @ v.T, t=0.3)
    rows = chunked(taid_loss, Unembed(hidden, w), Unembed(theirs, v), t=0.3, variant="paper")
    assert torch.allclose(rows, dense, atol=1e-5)
    loss = TAIDLoss(t_start=0.3)
    from kdcore.types import Unembed as Layer

    said = loss(Outputs(unembed=Layer(hidden, w)), Outputs(unembed=Layer(theirs, v)), Batch())
    assert torch.allclose(said, dense, atol=1e-5)


def test_t_moves_in_a_run_is_saved_and_never_moves_in_evaluation(tmp_path: Path) -> None:
    recipe = {
        "data": {"source": "kdcore.datasets:digits", "args": {"labels": 64, "flat": True}, "batch_size": 16},
        "teacher": {"main": {"use": "module", "model": "kdcore.zoo:mlp"}},
        "student": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [8]}},
        "loss": [{"use": "taid", "t_start": 0.2, "adaptive": False}],
        "train": {"epochs": 2, "checkpoint_every": 8},
    }
    kdcore.run(recipe, out=tmp_path / "run")
    from kdcore.checkpoint import load_state

    (path,) = (tmp_path / "run/stages/distill/student/state").glob("*.state")
    state = load_state(path)["model"]["losses.0._extra_state"]
    assert state["t"] == pytest.approx(0.2 + 0.8 * 7 / 8)  # 8 steps: the last update saw progress 7/8
    loss = TAIDLoss()
    loss.set_extra_state(state)
    assert loss.get_extra_state() == state


def test_a_slide_away_from_the_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="below t_start"):
        TAIDLoss(t_start=0.8, t_end=0.5)
    assert math.isinf(TAIDLoss().previous)
