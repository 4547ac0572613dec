"""The stock losses and how a plain function becomes a loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdcore.errors import InputError, KDError
from kdcore.function_loss import FunctionLoss
from kdcore.losses import kd_loss
from kdcore.types import Batch, Outputs, Unembed, conventions


def test_kd_against_the_card_of_divergences() -> None:
    # p = (.9, .1), q = (.5, .5): KL at T 2 is 0.13081, times T^2 0.52325; at T 1 0.36806
    teacher, student = torch.tensor([[math.log(9.0), 0.0]]), torch.zeros(1, 2)
    assert kd_loss(student, teacher, temperature=2.0).item() == pytest.approx(0.52325, abs=1e-5)
    assert kd_loss(student, teacher, temperature=1.0).item() == pytest.approx(0.36806, abs=1e-5)


def test_kd_gradient_is_t_times_the_difference_of_the_softened_probabilities() -> None:
    """Hinton et al. 2015, eq. 2, times T^2: dL/ds = T (q - p)."""
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, generator=rng, requires_grad=True)
    teacher = torch.randn(3, 5, generator=rng, requires_grad=True)
    kd_loss(student, teacher, temperature=3.0).sum().backward()
    with torch.no_grad():
        expected = 3.0 * (F.softmax(student / 3, -1) - F.softmax(teacher / 3, -1))
    assert torch.allclose(student.grad, expected, atol=1e-6)
    assert teacher.grad is None


def named(
    student_logits: torch.Tensor, teacher_hint: torch.Tensor, target: torch.Tensor, *, k: float = 2.0
) -> torch.Tensor:
    return k * student_logits.sum(-1) + teacher_hint.sum(-1) + target


def test_tensors_are_bound_by_name() -> None:
    loss = FunctionLoss(named, ("student_logits", "teacher_hint", "target"), {"k": 3.0})
    assert loss.wants() == ("student.logits", "teacher.hint")
    student = Outputs(logits=torch.ones(2, 4))
    teacher = Outputs(tensors={"hint": torch.ones(2, 5)})
    assert loss(student, teacher, Batch({"target": torch.tensor([0, 7])})).tolist() == [17.0, 24.0]


def test_the_models_own_target_comes_before_the_batchs() -> None:
    """An adapter that shifts tokens aligns the target with its logits; the batch's is not aligned."""
    loss = FunctionLoss(named, ("student_logits", "teacher_hint", "target"), {})
    student = Outputs(logits=torch.zeros(1, 1), target=torch.tensor([5]))
    teacher = Outputs(tensors={"hint": torch.zeros(1, 1)})
    assert loss(student, teacher, Batch({"target": torch.tensor([1])})).tolist() == [5.0]


def test_a_missing_name_is_named() -> None:
    loss = FunctionLoss(named, ("student_logits", "teacher_hint", "target"), {})
    with pytest.raises(KDError, match="no 'hint'"):
        loss(Outputs(logits=torch.zeros(1, 1)), Outputs(), Batch({"target": torch.zeros(1)}))
    with pytest.raises(InputError, match="needs 'target'"):
        loss(
            Outputs(logits=torch.zeros(1, 1)),
            Outputs(tensors={"hint": torch.zeros(1, 1)}),
            Batch({"x": torch.zeros(1)}),
        )


def test_conventions_travel_with_the_function() -> None:
    @conventions(hard_term=True, t_squared=False)
    def marked(student_logits: torch.Tensor) -> torch.Tensor:
        return student_logits

    loss = FunctionLoss(marked, ("student_logits",), {})
    assert (loss.hard_term, loss.t_squared, loss.zero_at_teacher, loss.couples_batch) == (
        True,
        False,
        False,
        False,
    )


def test_a_logit_loss_runs_on_hidden_states_by_itself() -> None:
    """Without logits but with an output layer the same function is computed in chunks, to the same value and gradient."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 4, generator=rng)
    hidden = torch.randn(2, 3, 4, generator=rng, requires_grad=True)
    theirs = torch.randn(2, 3, 4, generator=rng)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = FunctionLoss(kd_loss, ("student_logits", "teacher_logits"), {"temperature": 2.0})
    student = Outputs(unembed=Unembed(hidden, weight), mask=mask)
    value = loss(student, Outputs(unembed=Unembed(theirs, weight)), Batch())
    dense = torch.where(mask, kd_loss(hidden @ weight.T, theirs @ weight.T, temperature=2.0), 0.0)
    assert torch.allclose(value, dense, atol=1e-5)
    (chunked_grad,) = torch.autograd.grad(value.sum(), hidden)
    (dense_grad,) = torch.autograd.grad(dense.sum(), hidden)
    assert torch.allclose(chunked_grad, dense_grad, atol=1e-5)
    with pytest.raises(InputError, match="hidden states, the teacher logits"):
        loss(student, Outputs(logits=torch.zeros(2, 3, 11)), Batch())
