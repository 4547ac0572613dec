"""Dual-Head Knowledge Distillation (Yang, Zong, Huang, Feng, An; KDD 2025, arXiv 2411.08937).

A logit-level loss beside cross-entropy pulls a shared classifier two ways, but not the feature below it. So
the logit-level loss gets a classifier g' of its own, which is thrown away after training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcore import Batch, Loss, Outputs
from kdcore.functional import at_least_float32

Temperature = Annotated[float, Field(gt=0)]
Variant = Literal["paper", "released"]
Gradients = Sequence[Tensor | None]
HIDDEN, DROPOUT = 200, 0.1  # of the authors' nonlinear head
EPSILON = 1e-8  # the released clamp of probabilities


def binary_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 2.0,
    variant: Variant = "paper",
) -> Tensor:
    """tau^2 sum_k KL( Bern(sigma(t_k / tau)) || Bern(sigma(z_k / tau)) ); [..., C] of both, returns [...].

    Every class is a yes-or-no question, so the level of the logits counts, which softmax forgets.
    ``variant`` as in ``binary_kl_norm``. In float32 at least; no gradient to the teacher.
    """
    z, t = (at_least_float32(x) / temperature for x in (student_logits, teacher_logits.detach()))
    if variant == "released":
        q, p = _clamped(z), _clamped(t)
        divergence = F.kl_div(q.log(), p, reduction="none") + F.kl_div((1 - q).log(), 1 - p, reduction="none")
    else:
        divergence = t.sigmoid() * (t - z) + F.logsigmoid(-t) - F.logsigmoid(-z)
    return temperature**2 * divergence.sum(-1)


def binary_kl_norm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 2.0,
    variant: Variant = "paper",
) -> Tensor:
    """tau^2 sum_k KL( Bern(1/2) || Bern(sigma((z_k - t_k) / tau)) ); [..., C] of both, returns [...].

    Equal to tau^2 sum_k log cosh((z_k - t_k) / (2 tau)): a regression of logits, quadratic for small gaps, with
    the gradient (tau / 2) tanh((z_k - t_k) / (2 tau)). ``released`` clamps the probability to [1e-8, 1 - 1e-8]
    as the authors' code does: in float32 the upper bound is 1, so the value is inf and the gradient NaN for
    z - t above about 33 (tau = 2), and the gradient 0 below about -37. ``paper`` is the same divergence
    without the clamp, exact at any gap. In float32 at least; no gradient to the teacher.
    """
    d = (at_least_float32(student_logits) - at_least_float32(teacher_logits.detach())) / temperature
    if variant == "released":
        q = _clamped(d)
        divergence = -(q.log() + (1 - q).log()) / 2 - math.log(2)
    else:
        divergence = d.abs() / 2 + torch.log1p(torch.exp(-d.abs())) - math.log(2)
    return temperature**2 * divergence.sum(-1)


def align(g_kd: Gradients, g_ce: Gradients) -> list[Tensor | None]:
    """g_kd, without its part along g_ce if the two conflict (g_kd . g_ce < 0).

    One gradient (or None) a parameter each; the one product is over all of them. So a step along g_ce plus
    this moves along g_ce by at least |g_ce|^2.
    """
    pairs = [(a, b) for a, b in zip(g_kd, g_ce, strict=True) if a is not None and b is not None]
    if not pairs:
        return list(g_kd)
    dot = torch.stack([(a * b).sum() for a, b in pairs]).sum()
    norm = torch.stack([b.square().sum() for b in g_ce if b is not None]).sum()
    against = -dot.clamp_max(0) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return [_added(a, None if b is None else against * b) for a, b in zip(g_kd, g_ce, strict=True)]


def auxiliary_head(width: int, classes: int, head: Literal["linear", "nonlinear"]) -> nn.Module:
    """g': [B, width] -> [B, classes]; ``nonlinear`` for a teacher that is unlike the student."""
    if head == "linear":
        return nn.Linear(width, classes)
    return nn.Sequential(
        nn.Linear(width, HIDDEN),
        nn.Dropout(DROPOUT),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(inplace=True),
        nn.Linear(HIDDEN, classes),
    )


class DHKD(Loss):
    """A logit-level divergence between g'(feature) and the teacher's logits; cross-entropy stays the task's term.

    ``student.feature`` [B, ...] is the input of the student's own classifier (``reads.student.feature =
    "head.in"``), flattened. The auxiliary head is trained with the student and is no part of it, so nothing of
    it is shipped. ``head = "none"`` is the single-head baseline: then the feature must be logits (``"head"``).
    ``align`` projects the gradient of every term but the task's, see ``align``; without the task's term it only
    adds. The nonlinear head has batch norm, and therefore couples the batch.
    """

    reads = ("student.feature", "teacher.logits")

    def __init__(
        self,
        *,
        temperature: Temperature = 2.0,
        divergence: Literal["binary_kl_norm", "binary_kl"] = "binary_kl_norm",
        head: Literal["linear", "nonlinear", "none"] = "linear",
        align: bool = False,
        variant: Variant = "paper",
    ) -> None:
        super().__init__()
        self.temperature, self.head, self.variant = temperature, head, variant
        self.divergence = binary_kl_norm if divergence == "binary_kl_norm" else binary_kl
        self.couples_batch, self.zero_at_teacher = head == "nonlinear", head == "none"
        self.auxiliary: nn.Module = nn.Identity()
        if align:  # the core asks for separate gradients wherever there is a merge
            self.merge = self._merge

    def setup(self) -> None:
        if self.head == "none":
            return
        student, teacher = self.run.preview(self)
        width, classes = student["feature"].flatten(1).shape[1], teacher["logits"].shape[1]
        self.auxiliary = auxiliary_head(width, classes, self.head)

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> Tensor:
        z = self.auxiliary(student["feature"].flatten(1))
        return self.divergence(z, teacher["logits"], temperature=self.temperature, variant=self.variant)

    def _merge(self, grads: Mapping[str, list[Tensor | None]]) -> list[Tensor | None]:
        """The task's gradient plus every other term's, each aligned with the task's; over the student's parameters."""
        tasks = [each for name, each in grads.items() if name.partition(".")[0] == "task"]
        others = [each for name, each in grads.items() if name.partition(".")[0] != "task"]
        g_ce = _sum(tasks) if tasks else [None] * len(others[0])
        return _sum([g_ce, *(align(g_kd, g_ce) for g_kd in others)])

    def extra_repr(self) -> str:
        return f"{self.divergence.__name__}, temperature={self.temperature}, head={self.head}, {self.variant}"


def _clamped(x: Tensor) -> Tensor:
    return x.sigmoid().clamp(EPSILON, 1 - EPSILON)


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _sum(rows: Sequence[Gradients]) -> list[Tensor | None]:
    total = list(rows[0])
    for row in rows[1:]:
        total = [_added(a, b) for a, b in zip(total, row, strict=True)]
    return total
