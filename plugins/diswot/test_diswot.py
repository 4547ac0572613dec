"""DisWOT's distances: the authors' numbers, what they are blind to, the loss, what an untrained net shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_diswot.looks import distances, gaussian_, look
from kd_plugin_diswot.loss import DisWOTLoss
from kd_plugin_diswot.metrics import activation_distance, class_maps, gradient_distance, relation_distance
from kd_plugin_diswot.models import small_net, stage_net
from kd_plugin_diswot.oracle import ORACLES
from torch import Tensor, nn

from kdcore import Batch, InputError, Outputs
from kdcore.testing import check_oracle


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Any) -> None:
    check_oracle(oracle)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- relation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_relation_is_blind_to_scale_rotation_and_the_batchs_order(variant: Any) -> None:
    S, T = drawn(6, 3, 2, 2), drawn(6, 5, 4, 1, seed=1)
    value = relation_distance(S, T, variant=variant)
    rotation = torch.linalg.qr(drawn(12, 12, seed=2)).Q
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for same in (
        relation_distance(7.0 * S, 0.1 * T, variant=variant),
        relation_distance(S.flatten(1) @ rotation, T, variant=variant),
        relation_distance(S[order], T[order], variant=variant),
    ):
        torch.testing.assert_close(same, value)
    assert float(value) > 0.01
    assert abs(float(relation_distance(S[order], T, variant=variant) - value)) > 1e-3
    # alike up to scale and rotation is alike
    assert float(relation_distance(3 * S.flatten(1) @ rotation, S, variant=variant)) == pytest.approx(
        0, abs=1e-7
    )


def test_only_the_whole_matrix_sees_how_large_a_samples_activations_are() -> None:
    """Rows of unit norm forget each sample's scale where samples are orthogonal; the paper's form does not."""
    S, T = torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    assert float(relation_distance(S, T)) == 0
    assert float(relation_distance(S, T, variant="paper")) > 0.3


# ---- semantics --------------------------------------------------------------------------------------


def test_the_gradients_distance_in_closed_form() -> None:
    g_S, g_T = drawn(7, 5), drawn(7, 5, seed=1)
    a = (g_S.sign() * g_T.sign()).mean(1)
    closed = (2 - 2 * a * F.cosine_similarity(g_S, g_T)).mean()
    torch.testing.assert_close(gradient_distance(g_S, g_T), closed)


def test_what_the_gradients_distance_cannot_see() -> None:
    g_S, g_T, each = drawn(7, 5), drawn(7, 5, seed=1), drawn(7, 1, seed=2).abs() + 0.1
    assert float(gradient_distance(g_S, g_S)) == 0
    torch.testing.assert_close(gradient_distance(-g_S, g_T), gradient_distance(g_S, g_T))
    torch.testing.assert_close(gradient_distance(each * g_S, g_T), gradient_distance(g_S, g_T))
    assert 0 < float(gradient_distance(g_S, g_T)) < 4


def test_gradients_of_other_shapes_are_refused_and_not_broadcast() -> None:
    with pytest.raises(InputError, match="different shapes"):
        gradient_distance(drawn(10, 8), drawn(10, 4))
    with pytest.raises(InputError, match="different shapes"):
        gradient_distance(drawn(10, 8), drawn(1, 8))


def test_class_maps_average_to_the_logits() -> None:
    A, head = drawn(3, 4, 2, 5), nn.Linear(4, 6, bias=False).double()
    maps = class_maps(A, head.weight)
    assert maps.shape == (3, 6, 2, 5)
    torch.testing.assert_close(maps.mean((2, 3)), head(A.mean((2, 3))))
    with pytest.raises(InputError, match="takes the mean of"):
        class_maps(drawn(3, 5, 2, 2), head.weight)


def test_maps_at_other_places_and_widths_compare() -> None:
    S, T = drawn(4, 6, 3, 3), drawn(4, 6, 5, 5, seed=1)
    assert 0 < float(activation_distance(S, T)) <= 2
    assert float(activation_distance(S, 2 * S)) == pytest.approx(0, abs=1e-7)


# ---- the loss ---------------------------------------------------------------------------------------


def loss_on(
    feature: Tensor, weight: Tensor, others: dict[str, tuple[Tensor, Tensor]], **params: float
) -> Any:
    """The loss with a student and teachers whose last layers have these weights; its terms."""

    def model(w: Tensor) -> Any:
        net = nn.Sequential()
        net.add_module("head", nn.Linear(w.shape[1], w.shape[0], bias=False))
        net.head.weight = nn.Parameter(w)
        return SimpleNamespace(model=net)

    loss = DisWOTLoss(**params)
    student = model(weight)
    teachers = {name: model(w) for name, (_, w) in others.items()}
    loss.run = SimpleNamespace(student=student, teachers=teachers)  # type: ignore[assignment]
    said = {name: Outputs(tensors={"feature": A}) for name, (A, _) in others.items()}
    return loss(
        Outputs(tensors={"feature": feature}), said, Batch({"id": torch.arange(len(feature))})
    ), student


def test_the_loss_is_the_papers_distances_over_classes_and_samples_squared() -> None:
    A_S, w_S, A_T, w_T = (
        drawn(4, 3, 2, 2),
        drawn(5, 3, seed=1),
        drawn(4, 6, 3, 3, seed=2),
        drawn(5, 6, seed=3),
    )
    A_S.requires_grad_()
    terms, student = loss_on(A_S, w_S, {"main": (A_T, w_T)}, semantic=2.0, relation=3.0)
    torch.testing.assert_close(terms["relation"], 3 * relation_distance(A_S, A_T, variant="paper") / 16)
    M_s = activation_distance(class_maps(A_S, w_S), class_maps(A_T, w_T))
    torch.testing.assert_close(terms["semantic"], 2 * M_s / 25)
    terms["semantic"].backward()
    assert student.model.head.weight.grad.abs().max() > 0  # the maps are of the student's own last layer


def test_several_teachers_are_averaged_and_terms_of_weight_zero_left_out() -> None:
    A_S, w_S = drawn(4, 3, 2, 2), drawn(5, 3, seed=1)
    others = {"a": (drawn(4, 6, seed=2)[..., None], drawn(5, 6, seed=3)), "b": (A_S, w_S)}
    both, _ = loss_on(A_S, w_S, others)
    alone, _ = loss_on(A_S, w_S, {"a": others["a"]})
    for name in ("relation", "semantic"):
        torch.testing.assert_close(both[name], alone[name] / 2)  # b is the student itself
    assert loss_on(A_S, w_S, others, semantic=0.0, relation=0.0)[0] == {}


# ---- what a net shows -------------------------------------------------------------------------------


def shown(net: nn.Module, seed: int = 0) -> Any:
    images = drawn(16, 1, 8, 8, seed=seed).float()
    return look(lambda: net(images), net, torch.arange(16) % 10, feature="body", head="head")


def test_a_look_is_the_activations_and_the_last_layers_gradient_and_leaves_none() -> None:
    torch.manual_seed(0)
    net = small_net()
    seen = shown(net)
    images, target = drawn(16, 1, 8, 8).float(), torch.arange(16) % 10
    p = net(images).softmax(1) - F.one_hot(target, 10)  # d CE / d logits, times B
    torch.testing.assert_close(seen.gradient, p.T @ net.body(images).mean((2, 3)) / 16)
    torch.testing.assert_close(seen.feature, net.body(images))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(net.body._forward_hooks)
    assert not seen.feature.requires_grad


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_net_is_at_no_distance_from_itself(variant: Any) -> None:
    torch.manual_seed(0)
    seen, other = shown(small_net()), shown(small_net(kernel=5))
    assert distances(seen, seen, variant) == pytest.approx((0, 0), abs=1e-6)
    assert min(distances(other, seen, variant)) > 1e-5


def test_widths_may_differ_in_the_papers_form_only() -> None:
    mine, theirs = shown(small_net(features=16)), shown(small_net(features=32))
    assert all(value > 0 for value in distances(mine, theirs, "paper"))
    with pytest.raises(InputError, match="different shapes"):
        distances(mine, theirs, "released")
    assert distances(mine, theirs, "released", semantic=False).relation > 0


def test_gaussian_initialisation() -> None:
    torch.manual_seed(0)
    net = gaussian_(stage_net(depths=(1, 1, 1)))
    weights = torch.cat(
        [m.weight.detach().flatten() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    )
    assert abs(float(weights.mean())) < 0.02
    assert float(weights.std()) == pytest.approx(1, abs=0.02)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((m.weight == 1).all()) and not bool(m.bias.any()) for m in norms)
    assert not bool(net.head.bias.any())


def test_paths_that_are_not_there_are_named() -> None:
    net, images = small_net(), torch.zeros(2, 1, 8, 8)
    for paths, problem in (
        ({"feature": "bodi", "head": "head"}, "no module at this path"),
        ({"feature": "body", "head": "body"}, "must be linear"),
    ):
        with pytest.raises(InputError, match=problem):
            look(lambda: net(images), net, torch.zeros(2, dtype=torch.int64), **paths)
