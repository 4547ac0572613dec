"""Distillation on the teacher head, and the single-head baseline without gradient conflicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import Batch, Loss, Outputs

Temperature = Annotated[float, Field(gt=0)]


def dho_loss(student_z_kd: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 2.0) -> Tensor:
    """T^2 sum_c softmax(t/T) (log softmax(t/T) - log softmax(z_kd/T)); [B,C] of both, returns [B].

    T is 2 in all of the authors' scripts. No gradient to the teacher; softmax in float32 at least.
    """
    z, t = (
        x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        for x in (student_z_kd, teacher_logits.detach())
    )
    log_q, log_p = F.log_softmax(z / temperature, dim=-1), F.log_softmax(t / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


class DHOLoss(Loss):
    """``dho_loss`` on labelled and unlabelled samples alike.

    ``variant = "paper"``: one mean over the union of the streams. ``"released"``: each stream's own mean,
    added up (so a labelled sample counts more where its batch is smaller). Labels never reach this loss.
    """

    reads = ("student.z_kd", "teacher.logits")
    zero_at_teacher = True

    def __init__(
        self, *, temperature: Temperature = 2.0, variant: Literal["paper", "released"] = "paper"
    ) -> None:
        super().__init__()
        self.temperature, self.all_streams = temperature, variant == "paper"

    def forward(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        if not self.all_streams:
            return dho_loss(student["z_kd"], teacher["logits"], temperature=self.temperature)
        each = [self._of(student, streams) for streams in teacher.values()]
        return torch.stack(each).mean(0)

    def _of(self, student: Mapping[str, Outputs], teacher: Mapping[str, Outputs]) -> Tensor:
        rows = [
            dho_loss(outputs["z_kd"], teacher[stream]["logits"], temperature=self.temperature)
            for stream, outputs in student.items()
        ]
        return torch.cat(rows)


class PCGrad(DHOLoss):
    """The baseline of one head (``tied``): the same loss, conflicts with the task's gradient projected away.

    Yu et al., Gradient Surgery for Multi-Task Learning, 2020: where two terms' gradients g_i, g_j (over all
    of the student's parameters) have g_i . g_j < 0, g_i loses its part along g_j; the results are added.
    """

    def merge(self, grads: Mapping[str, list[Tensor | None]]) -> list[Tensor | None]:
        """Two or more terms' gradients, one list over the student's parameters each, to one."""
        order = torch.randperm(len(grads), generator=self.run.shared_generator).tolist()
        names = [list(grads)[i] for i in order]
        whole = [self._surgery(grads, name, names) for name in grads]
        return [_added(column) for column in zip(*whole, strict=True)]

    @staticmethod
    def _surgery(
        grads: Mapping[str, list[Tensor | None]], name: str, names: list[str]
    ) -> list[Tensor | None]:
        mine = grads[name]
        for other in names:
            theirs = grads[other]
            pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
            dot = sum(float((a * b).sum()) for a, b in pairs)
            if other != name and dot < 0:
                share = dot / sum(float(b.square().sum()) for b in theirs if b is not None)
                mine = [
                    _added((a, None if b is None else -share * b)) for a, b in zip(mine, theirs, strict=True)
                ]
        return mine


def _added(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.stack(there).sum(0) if there else None
