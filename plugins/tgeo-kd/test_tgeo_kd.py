"""TGeo-KD's mathematics: the authors' code (Chengming0501/TGeo-KD, 5a69cbe), closed forms, brute force."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_tgeo_kd.bilevel import look_ahead
from kd_plugin_tgeo_kd.geometry import FusionRatio, class_means, trilateral
from kd_plugin_tgeo_kd.loss import fused_loss
from kd_plugin_tgeo_kd.oracle import ORACLES, wave
from torch import Tensor, nn

from kdcore.losses import kd_loss
from kdcore.testing import Oracle, check_oracle


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    assert check_oracle(oracle)


def probabilities(phase: float, *shape: int) -> Tensor:
    return torch.tensor(wave(phase, *shape)).softmax(1)


def test_the_released_controller_with_the_authors_numbers() -> None:
    f = FusionRatio(3, (32, 16)).double()
    for index, value in enumerate(f.state_dict().values()):
        value.copy_(0.5 * torch.tensor(wave(0.3 * index, *value.shape)))
    S, T, y = probabilities(0.0, 4, 3), probabilities(1.0, 4, 3), torch.tensor([0, 2, 1, 0])
    G = F.one_hot(y, 3).double()
    delta = trilateral(S, T, class_means([(T, y)]).double()[y], G, squared=True)
    expected = [0.9998143484590128, 0.9998900967816674, 0.9998659378604546, 0.9997527619011797]
    assert f(delta).tolist() == pytest.approx(expected, rel=1e-7)  # Tbar is kept in float32


def test_edges_close_and_sum_to_nothing() -> None:
    S, T, B, G = (probabilities(phase, 6, 5) for phase in (0.0, 1.0, 2.0, 3.0))
    delta = trilateral(S, T, B, G)
    assert delta.shape == (6, 45)
    sg, tg, st, bg, sb = delta[:, :25].unflatten(1, (5, 5)).unbind(1)
    assert torch.allclose(sg, tg + st)
    assert torch.allclose(sg, bg + sb)
    assert delta[:, :25].unflatten(1, (5, 5)).sum(2).abs().max() < 1e-12


def test_class_means_go_by_label_in_any_order_and_batching() -> None:
    T, y = probabilities(0.5, 9, 4), torch.tensor([0, 1, 1, 3, 0, 3, 3, 1, 0])
    means = class_means([(T[:4], y[:4]), (T[4:], y[4:])])
    for c in (0, 1, 3):
        assert torch.allclose(means[c], T[y == c].mean(0).float())
    assert means[2].tolist() == [0.25] * 4  # a class that never comes still has a row
    assert torch.allclose(means.sum(1), torch.ones(4))
    order = torch.tensor([8, 3, 1, 0, 2, 7, 5, 4, 6])
    assert torch.allclose(class_means([(T[order], y[order])]), means)


def test_ratio_one_is_distillation_and_zero_the_labels() -> None:
    s, t, y = torch.tensor(wave(0.0, 5, 3)), torch.tensor(wave(1.0, 5, 3)), torch.tensor([0, 1, 2, 0, 1])
    kd = 4 * F.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="none").sum(1)
    assert torch.allclose(fused_loss(s, t, y, torch.ones(5), temperature=2.0), kd.float())
    ce = F.cross_entropy(s, y, reduction="none").float()
    assert torch.allclose(fused_loss(s, t, y, torch.zeros(5), temperature=2.0), ce)


def test_the_ratio_lies_between_0_and_1() -> None:
    torch.manual_seed(0)
    alpha = FusionRatio(3)(torch.randn(50, 27))
    assert alpha.shape == (50,)
    assert ((alpha > 0) & (alpha < 1)).all()


# ---- the outer gradient -----------------------------------------------------------------------------


class Toy:
    """A linear student on four samples, ratios that are parameters themselves, three held-out samples."""

    def __init__(self) -> None:
        self.x, self.t, self.y = (
            torch.tensor(wave(0.2, 4, 3)),
            torch.tensor(wave(1.4, 4, 3)),
            torch.tensor([0, 2, 1, 1]),
        )
        self.held, self.label = torch.tensor(wave(2.2, 3, 3)), torch.tensor([1, 0, 2])
        self.omega = torch.tensor(wave(0.9, 4), requires_grad=True)
        self.theta = {"W": torch.tensor(0.4 * wave(3.0, 3, 3), requires_grad=True)}

    def terms(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        z = self.x @ theta["W"].T
        p = (self.t / 4).log_softmax(1)
        kd = 16 * F.kl_div((z / 4).log_softmax(1), p, reduction="none", log_target=True).sum(1)
        return kd, F.cross_entropy(z, self.y, reduction="none")

    def inner(self, theta: Mapping[str, Tensor]) -> Tensor:
        kd, gt = self.terms(theta)
        alpha = self.omega.sigmoid()
        return (alpha * kd + (1 - alpha) * gt).mean()

    def outer(self, theta: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.held @ theta["W"].T, self.label)


def test_the_outer_gradient_is_the_closed_form() -> None:
    """dJ_val/dalpha_i = -(eta/N) <grad(L_KD_i - L_GT_i), grad J_val(theta')>, with per-sample gradients one by one."""
    toy, rate = Toy(), 0.7
    found = look_ahead(toy.inner, toy.outer, toy.theta, rate)
    (by_omega,) = torch.autograd.grad(found.surrogate, toy.omega)
    W = toy.theta["W"]
    kd, gt = toy.terms(toy.theta)
    each = [torch.autograd.grad(kd[i] - gt[i], W, retain_graph=True)[0] for i in range(4)]
    (step,) = torch.autograd.grad(toy.inner(toy.theta), W)
    ahead = (W - rate * step).detach().requires_grad_()
    value = toy.outer({"W": ahead})
    (pull,) = torch.autograd.grad(value, ahead)
    by_alpha = torch.stack([-(rate / 4) * (g * pull).sum() for g in each])
    alpha = toy.omega.sigmoid()
    assert torch.allclose(by_omega, by_alpha * alpha * (1 - alpha), rtol=1e-10, atol=0)
    assert found.held_out.item() == pytest.approx(value.item(), rel=1e-12)


def test_the_outer_gradient_is_that_of_brute_force() -> None:
    toy, rate, h = Toy(), 0.7, 1e-5
    found = look_ahead(toy.inner, toy.outer, toy.theta, rate)
    (by_omega,) = torch.autograd.grad(found.surrogate, toy.omega)

    def ahead(i: int, by: float) -> float:
        with torch.no_grad():
            toy.omega[i] += by
        (step,) = torch.autograd.grad(toy.inner(toy.theta), toy.theta["W"])
        with torch.no_grad():
            toy.omega[i] -= by
            return toy.outer({"W": toy.theta["W"] - rate * step}).item()

    brute = [(ahead(i, h) - ahead(i, -h)) / (2 * h) for i in range(4)]
    assert by_omega.tolist() == pytest.approx(brute, rel=1e-6)


def test_looking_ahead_changes_nothing() -> None:
    toy = Toy()
    before = toy.theta["W"].detach().clone()
    look_ahead(toy.inner, toy.outer, toy.theta, 0.7)
    assert torch.equal(toy.theta["W"], before)
    assert toy.theta["W"].grad is None
    assert toy.omega.grad is None


def test_one_look_raises_the_ratio_of_a_teacher_that_helps() -> None:
    """Held-out labels that the teacher agrees with, training labels that are wrong: alpha must go up, and else down."""
    for helps in (True, False):
        x, omega = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64, requires_grad=True)
        good, bad = torch.arange(3), torch.tensor([1, 2, 0])
        t, y = (F.one_hot(v, 3).double() * 4 for v in ((good, bad) if helps else (bad, good)))
        theta = {"W": torch.zeros(3, 3, dtype=torch.float64)}

        def inner(
            p: Mapping[str, Tensor], t: Tensor = t, y: Tensor = y, a: Tensor = omega, x: Tensor = x
        ) -> Tensor:
            return fused_loss(x @ p["W"].T, t, y.argmax(1), a.sigmoid()).mean()

        def outer(p: Mapping[str, Tensor], x: Tensor = x, good: Tensor = good) -> Tensor:
            return F.cross_entropy(x @ p["W"].T, good)

        (slope,) = torch.autograd.grad(look_ahead(inner, outer, theta, 0.5).surrogate, omega)
        assert bool((slope < 0).all()) is helps
        assert bool((slope > 0).all()) is not helps


def test_students_with_fused_attention_can_be_looked_ahead() -> None:
    torch.manual_seed(0)
    layer, head, x, y = nn.Linear(4, 12), torch.randn(3, 4), torch.randn(2, 5, 4), torch.tensor([0, 2])
    ratio = torch.zeros(2, requires_grad=True)

    def logits(p: Mapping[str, Tensor]) -> Tensor:
        q, k, v = F.linear(x, p["weight"], p["bias"]).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).mean(1) @ head.T

    def inner(p: Mapping[str, Tensor]) -> Tensor:
        a = ratio.sigmoid()
        return (
            a * kd_loss(logits(p), torch.ones(2, 3))
            + (1 - a) * F.cross_entropy(logits(p), y, reduction="none")
        ).mean()

    found = look_ahead(inner, lambda p: F.cross_entropy(logits(p), y), dict(layer.named_parameters()), 0.1)
    (slope,) = torch.autograd.grad(found.surrogate, ratio)
    assert slope.abs().min() > 0
