"""The sample-wise term that SinKD is added to, and the control that takes its pairing away."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import Batch, Loss, Outputs
from kdcore.functional import at_least_float32

Temperature = Annotated[float, Field(gt=0)]


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """-sum_c softmax(t / T) log softmax(s / T); [..., C] of both, returns [...]. No T^2, and not 0 at the teacher.

    In float32 at least; no gradient to the teacher.
    """
    s, t = (at_least_float32(x) / temperature for x in (student_logits, teacher_logits.detach()))
    return -(t.softmax(-1) * F.log_softmax(s, -1)).sum(-1)


def annealed_temperature(start: float, epoch: int, epochs: int) -> float:
    """Linear in the epoch: ``start`` in the first (0), 1 in the last (epochs - 1)."""
    return start + (1 - start) * epoch / max(epochs - 1, 1)


class SoftCrossEntropy(Loss):
    """``soft_cross_entropy``; with ``anneal``, its temperature goes from ``temperature`` to 1 over the epochs."""

    t_squared = False

    def __init__(self, *, temperature: Temperature = 1.0, anneal: bool = False) -> None:
        super().__init__()
        self.temperature, self.anneal = temperature, anneal

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> Tensor:
        temperature = self.temperature
        if self.anneal:
            epochs = math.ceil(self.run.total_steps / self.run.steps_per_epoch)
            temperature = annealed_temperature(temperature, self.run.epoch, epochs)
        return soft_cross_entropy(student["logits"], teacher["logits"], temperature=temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, anneal={self.anneal}"


class Shuffled(Loss):
    """``loss`` with the teacher's rows moved on by one sample of the (shuffled) batch, so that no pair is right.

    What is left of a loss here is what it learns from the batch as a set.
    """

    couples_batch = True

    def __init__(self, *, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.hard_term, self.t_squared = loss.hard_term, loss.t_squared

    def wants(self) -> tuple[str, ...]:
        return self.loss.wants()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        rows = torch.arange(len(batch)).roll(1)
        return self.loss(student, replace(teacher.at(rows), rows=teacher.rows), batch)
