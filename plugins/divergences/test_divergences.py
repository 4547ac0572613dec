"""Each divergence against values worked out by hand for p = (.9, .1), q = (.5, .5), and against one another."""

from __future__ import annotations

import math
from typing import Any

import kd_plugin_divergences.losses as losses
import pytest
import torch

from kdcore import InputError
from kdcore.api import build
from kdcore.types import Batch, Outputs

P = torch.tensor([[math.log(9.0), 0.0]])
Q = torch.zeros(1, 2)
VALUES: list[tuple[str, dict[str, float], float]] = [
    ("forward_kl", {}, 0.36806),
    ("forward_kl", {"temperature": 2.0}, 0.52325),
    ("reverse_kl", {}, 0.51083),
    ("jeffreys", {}, 0.87889),
    ("js", {}, 0.10175),
    ("generalized_js", {"beta": 0.1}, 0.03360),
    ("generalized_js", {"beta": 0.9}, 0.04307),
    ("skew_forward_kl", {"alpha": 0.1}, 0.30714),
    ("skew_reverse_kl", {"alpha": 0.1}, 0.36532),
    ("total_variation", {}, 0.4),
    ("hellinger", {}, 0.10557),
    ("alpha_divergence", {"alpha": 0.5}, 0.42229),
]


@pytest.mark.parametrize(("name", "params", "value"), VALUES)
def test_worked_values(name: str, params: dict[str, Any], value: float) -> None:
    assert getattr(losses, name)(Q, P, **params).item() == pytest.approx(value, abs=2e-5)


def test_adaptive_kl_on_three_classes() -> None:
    """p (.7, .2, .1), q (.4, .2, .4): head {.7}, gaps .3 and .3, so w = 0.5."""
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.4, 0.2, 0.4]]).log()
    assert losses.adaptive_kl(q, p).item() == pytest.approx(0.29189, abs=2e-5)


@pytest.mark.parametrize("name", sorted({v[0] for v in VALUES} | {"adaptive_kl"}))
def test_zero_at_the_teacher_and_never_negative(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(50, 7, generator=rng), torch.randn(50, 7, generator=rng)
    function = getattr(losses, name)
    assert function(teacher, teacher).abs().max() < 1e-5
    assert function(student, teacher).min() > 0
    assert function.zero_at_teacher


def test_as_a_component_of_a_recipe() -> None:
    loss = build("loss", "divergences.generalized_js", beta=0.9)
    value = loss(Outputs(logits=Q), Outputs(logits=P), Batch())
    assert value.item() == pytest.approx(0.04307, abs=2e-5)
    with pytest.raises(InputError, match="out of range"):
        build("loss", "divergences.generalized_js", beta=1.0)
