"""The outer gradient: one step of the student looked ahead, judged on held-out labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Parameters = Mapping[str, Tensor]
Objective = Callable[[Parameters], Tensor]


class Ahead(NamedTuple):
    """What ``look_ahead`` finds, both scalars."""

    surrogate: Tensor  # its gradient by omega is the outer gradient; its value means nothing
    held_out: Tensor  # J_val(theta'), detached


def look_ahead(
    inner: Objective,
    outer: Objective,
    theta: Parameters,
    rate: float,
    mean: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Ahead:
    """d/d omega of J_val(theta'), theta' = theta - rate * d/d theta J_train(theta, omega), as a surrogate's gradient.

    ``inner`` is J_train, a scalar function of the student's parameters whose graph reaches omega through the ratios
    alone; ``outer`` is J_val. By the chain rule the outer gradient is -rate * d/d omega <d/d theta J_train, v> with
    v = d/d theta' J_val(theta') held constant, so J_val's graph is needed once only. Neither theta nor any ``.grad``
    is changed. ``mean`` averages a detached gradient over processes.
    """
    names = list(theta)
    here = {name: theta[name].detach().requires_grad_() for name in names}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        steps = _gradients(inner(here), here, create_graph=True)
        ahead = {
            name: (here[name] - rate * mean(step.detach())).detach().requires_grad_()
            for name, step in zip(names, steps, strict=True)
        }
        held_out = outer(ahead)
        pull = _gradients(held_out, ahead)
    inner_product = sum(
        ((g * v).sum() for g, v in zip(steps, pull, strict=True)), torch.zeros(()).to(held_out)
    )
    return Ahead(-rate * inner_product, held_out.detach())


def _gradients(value: Tensor, at: Parameters, create_graph: bool = False) -> list[Tensor]:
    """d value / d each parameter; zeros where it does not reach."""
    found = torch.autograd.grad(value, list(at.values()), create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(at.values(), found, strict=True)]
