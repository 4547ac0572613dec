"""What an untrained network shows on one labelled batch, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugin_diswot.metrics import (
    Variant,
    activation_distance,
    class_maps,
    gradient_distance,
    relation_distance,
)
from kdcore import InputError


class Look(NamedTuple):
    """One forward and one backward, detached. ``gradient`` is of the cross-entropy by the last layer's weight."""

    feature: Tensor  # [B, C, ...], before global pooling
    weight: Tensor  # [N, D]
    gradient: Tensor  # [N, D]


class Distances(NamedTuple):
    """Of a student from a teacher; the score is the negative sum."""

    relation: float
    semantic: float


def module_at(model: nn.Module, path: str, place: str) -> nn.Module:
    """The module at a path; InputError names those that there are."""
    modules = dict(model.named_modules())
    if path not in modules:
        raise InputError(
            place, "no module at this path", given=path, allowed=[name for name in modules if name]
        )
    found: nn.Module = modules[path]
    return found


def weight_of(model: nn.Module, head: str, place: str) -> Tensor:
    """The weight [N, D] of the last layer at path ``head``."""
    weight = getattr(module_at(model, head, place), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise InputError(place, "the last layer has no weight of two axes: it must be linear", given=head)
    return weight


@torch.no_grad()
def gaussian_(model: nn.Module) -> nn.Module:
    """The ranking scripts' initialisation, in place: weights of convolutions and linear layers ~ N(0, 1),
    normalisation 1, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
        else:
            continue
        if isinstance(module.bias, Tensor):
            nn.init.zeros_(module.bias)
    return model


def look(forward: Callable[[], Tensor], model: nn.Module, target: Tensor, *, feature: str, head: str) -> Look:
    """What ``model`` shows: ``forward()`` gives its logits [B, N] of the batch whose classes are ``target`` [B].

    ``feature`` and ``head`` are paths of modules of ``model``. In train mode, so batch norm takes the batch's own
    statistics (whose running ones move). No parameter keeps a gradient.
    """
    seen: list[Tensor] = []
    weight = weight_of(model, head, "head")
    hook = module_at(model, feature, "feature").register_forward_hook(lambda *call: seen.append(call[2]))
    model.train()
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(F.cross_entropy(forward(), target), weight)
    finally:
        hook.remove()
    return Look(seen[-1].detach().clone(), weight.detach().clone(), gradient)


def distances(
    student: Look, teacher: Look, variant: Variant = "released", *, semantic: bool = True
) -> Distances:
    """M_r and M_s (``paper``), or m_r and m_s (``released``); ``semantic = False`` leaves the second out (NaN).

    The released semantic distance needs last layers of equal shape, the paper's features that these take the
    mean of; InputError otherwise.
    """
    relation = float(relation_distance(student.feature, teacher.feature, variant=variant))
    if not semantic:
        return Distances(relation, math.nan)
    if variant == "released":
        return Distances(relation, float(gradient_distance(student.gradient, teacher.gradient)))
    maps = [class_maps(each.feature, each.weight) for each in (student, teacher)]
    return Distances(relation, float(activation_distance(*maps)))
