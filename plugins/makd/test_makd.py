"""MaKD's loss and student: the authors' numbers, the card's closed forms, and what the head must and must not do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kd_plugin_makd.loss import makd_loss, released_correct, yes_probability
from kd_plugin_makd.oracle import ORACLES
from kd_plugin_makd.student import WiderHead
from torch import Tensor, nn

import kdcore
from kdcore import Batch, InputError
from kdcore.building import Builder
from kdcore.testing import Oracle, check_oracle


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# ---- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


def test_fifty_questions_of_the_authors_code() -> None:
    z_a, p = (2 * normal(1, 4, 50)).requires_grad_(), torch.sigmoid(2 * normal(2, 4, 50))
    loss = makd_loss(z_a, p).mean()
    (grad,) = torch.autograd.grad(loss, z_a)
    assert loss.item() == pytest.approx(1.0403828736751304, abs=1e-9)
    assert grad.abs().sum().item() == pytest.approx(0.36678972453439607, abs=1e-9)
    first = [0.0032986191435076585, -0.0012228869472411376, 0.001221261701619124, -0.004295218623147587]
    assert grad[0, :4].tolist() == pytest.approx(first, abs=1e-9)


def test_closed_forms() -> None:
    assert makd_loss(row(0, 0, 0), row(0.1, 0.5, 0.9)).item() == pytest.approx(math.log(2))
    z_a, p = row(0, 2).requires_grad_(), row(0.5, 0.5)
    loss = makd_loss(z_a, p)
    assert loss.item() == pytest.approx(0.910038, abs=1e-6)
    assert torch.autograd.grad(loss.sum(), z_a)[0].flatten().tolist() == pytest.approx(
        [0, 0.190399], abs=1e-6
    )


def test_the_least_value_is_the_entropy_of_the_answers() -> None:
    p = row(0.9, 0.2)
    least = makd_loss(torch.logit(p), p)
    assert least.item() == pytest.approx(0.412743, abs=1e-6)
    for step in (-0.1, 0.1):
        assert (makd_loss(torch.logit(p) + step, p) > least).all()


def test_order_and_number_of_questions_do_not_matter() -> None:
    z_a, p = normal(3, 5, 7), torch.sigmoid(normal(4, 5, 7))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    expected = makd_loss(z_a, p)
    torch.testing.assert_close(makd_loss(z_a[:, order], p[:, order]), expected)
    torch.testing.assert_close(makd_loss(z_a.repeat(1, 2), p.repeat(1, 2)), expected)
    assert not torch.allclose(makd_loss(z_a[:, order], p), expected)


def test_large_outputs_stay_finite_and_the_answers_get_no_gradient() -> None:
    z_a = row(1e4, -1e4).requires_grad_()
    p = row(0.0, 1.0).requires_grad_()
    loss = makd_loss(z_a, p)
    loss.sum().backward()
    assert loss.item() == pytest.approx(1e4)
    assert p.grad is None
    assert z_a.grad is not None
    assert z_a.grad.tolist() == [[0.5, -0.5]]


def test_the_probability_of_yes() -> None:
    assert yes_probability(row(3, 1)).item() == pytest.approx(0.880797, abs=1e-6)
    torch.testing.assert_close(yes_probability(row(3, 1) + 100), yes_probability(row(3, 1)))
    torch.testing.assert_close(yes_probability(normal(5, 9, 2)), normal(5, 9, 2).softmax(-1)[:, 0])


# ---- the student ------------------------------------------------------------------------------------------


class Headed(nn.Module):
    """A backbone that is nothing but its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Any:
        return self.head(inputs)


def wider(model: Any = "kdcore.zoo:mlp", **params: Any) -> WiderHead:
    backbone = Builder(0).make("student", "module", {"model": model}, "student.backbone")
    return WiderHead(backbone=backbone, **{"questions": 6, **params})


def test_a_whole_step_of_the_authors_code() -> None:
    """MaKD.forward_train with one linear layer of 3 + 2 outputs, alpha 4: both losses, and the layer's gradient."""
    student = wider(Headed, questions=2).double()
    W = normal(3, 5, 4)
    with torch.no_grad():
        student.class_head.weight.copy_(W[:3]), student.class_head.bias.zero_()
        student.aspect_head.weight.copy_(W[3:]), student.aspect_head.bias.zero_()
    out = student(Batch({"input": normal(4, 3, 4)}))
    p = torch.tensor([[0.9, 0.2], [0.5, 0.1], [1.0, 0.0]], dtype=torch.float64)
    ce = F.cross_entropy(out["logits"], torch.tensor([0, 2, 1]))
    makd = 4 * makd_loss(out["aspects"], p).mean()
    assert ce.item() == pytest.approx(1.3328688672449565, abs=1e-12)
    assert makd.item() == pytest.approx(5.632392606133755, abs=1e-12)
    (ce + makd).backward()
    assert student.class_head.weight.grad is not None
    assert student.aspect_head.weight.grad is not None
    grads = [*student.class_head.weight.grad[0].tolist(), *student.aspect_head.weight.grad[1].tolist()]
    expected = [0.027154568849597882, -0.31377778637926157, 0.39462035781752114, -0.2289635734971208]
    expected += [0.0019228185557560173, -1.4764671195053347, 0.15711800207568621, 0.16707429080892142]
    assert grads == pytest.approx(expected, abs=1e-12)


def test_each_block_of_outputs_learns_from_its_own_loss() -> None:
    student, batch = wider(), Batch({"input": normal(6, 8, 64).float()})
    out, p = student(batch), torch.sigmoid(normal(7, 8, 6)).float()
    names = ["class_head.weight", "aspect_head.weight", "backbone.module.hidden0.0.weight"]
    params = [student.get_parameter(name) for name in names]
    ce = F.cross_entropy(out["logits"], torch.arange(8))
    of_ce = torch.autograd.grad(ce, params, allow_unused=True, retain_graph=True)
    of_makd = torch.autograd.grad(makd_loss(out["aspects"], p).sum(), params, allow_unused=True)
    assert [g is not None for g in of_ce] == [True, False, True]
    assert [g is not None for g in of_makd] == [False, True, True]


def test_without_the_loss_it_is_the_backbone() -> None:
    """The capacity control: the same class outputs and class gradients as the backbone alone."""
    alone = Builder(0).make("student", "module", {"model": "kdcore.zoo:mlp"}, "student.backbone")
    batch = Batch({"input": normal(8, 5, 64).float()})
    assert torch.equal(wider()(batch)["logits"], alone(batch)["logits"])


def test_what_is_shipped_has_the_class_outputs_alone() -> None:
    student, x = wider().eval(), normal(9, 5, 64).float()
    with torch.no_grad():
        student.aspect_head.bias.fill_(1e6)
    out, module = student(Batch({"input": x})), student.deploy()
    shipped = module(x)
    assert list(shipped) == ["logits"]
    assert torch.equal(shipped["logits"], out["logits"])
    assert shipped["logits"].shape == (5, 10)
    assert not any("aspect" in name for name in module.state_dict())
    target = out["logits"].argmax(-1)
    assert not released_correct(out["logits"], out["aspects"], target).any()
    assert released_correct(out["logits"], out["aspects"] - 2e6, target).all()


def test_a_head_that_cannot_be_widened_is_refused() -> None:
    with pytest.raises(InputError, match="no linear layer") as error:
        wider(head="hidden0")
    assert error.value.allowed == "hidden0.0, head"


def test_the_recipe_trains_and_its_probe_counts_both_ways(tmp_path: Path) -> None:
    short = ["train.epochs=1", "teacher.main.train.epochs=1", "teacher.main.args.hidden=[4]"]
    result = kdcore.run("makd:digits", out=tmp_path / "run", overrides=short)
    assert [t["term"] for t in result.results["student"]["guards"]["terms"]] == ["makd", "task"]
    probe = result.results["probes"]["makd"]
    assert probe["accuracy"] == pytest.approx(result.metrics["accuracy"])
    assert probe["accuracy_released"] <= probe["accuracy"]
    assert probe["accuracy"] - probe["accuracy_released"] <= probe["aspect_wins"]
