"""The losses that the paper studies, as its authors compute them: a mean over each sequence, then over sequences."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcore import Batch, Loss, Outputs
from kdcore.functional import forward_kl, js, reverse_kl

Kind = Literal["forward", "reverse", "js"]
Temperature = Annotated[float, Field(gt=0)]
DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "js": js}


def sequence_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    kind: Kind = "forward",
    temperature: Temperature = 1.0,
) -> Tensor:
    """[B]: sum_t m_t D(softmax(z_T/T), softmax(z_S/T)) / sum_t m_t, times T squared; a short sequence weighs as a long one.

    Logits [B,L,V] with ``mask`` [B,L] (None: all), or [B,C]. ``kind``: KL(p_T || p_S) (the code's "SeqKD", on
    the data set's own text), KL(p_S || p_T) (RevKD), or the Jensen-Shannon divergence (GKD's). 0 for a sequence
    that is masked throughout. Computed in float32; no gradient to the teacher.
    """
    rows = DIVERGENCES[kind](student_logits, teacher_logits, temperature=temperature)
    if rows.dim() == 1:
        return rows
    keep = torch.ones_like(rows) if mask is None else mask.to(rows.dtype)
    return torch.where(keep > 0, rows, 0.0).sum(-1) / keep.sum(-1).clamp_min(1.0)


class SequenceDivergence(Loss):
    """``sequence_divergence`` with the paper's two sensitivity knobs: the temperature, and Gaussian noise on z_T.

    ``noise`` is its standard deviation in logits; the noise is a function of the run's seed and step.
    """

    zero_at_teacher = True

    def __init__(
        self,
        *,
        kind: Kind = "forward",
        temperature: Temperature = 1.0,
        noise: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        super().__init__()
        self.kind, self.temperature, self.noise = kind, temperature, noise
        self.zero_at_teacher = noise == 0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        z_s, z_t = (_logits(each) for each in (student, teacher))
        if self.noise:
            z_t = z_t + self.noise * self._normal(z_t)
        return sequence_divergence(z_s, z_t, student.mask, kind=self.kind, temperature=self.temperature)

    def _normal(self, like: Tensor) -> Tensor:
        rng = self.run.rng("kd-fidelity", shared=False)
        return torch.randn(like.shape, generator=rng).to(like)

    def extra_repr(self) -> str:
        return f"{self.kind}, temperature={self.temperature}, noise={self.noise}"


def _logits(outputs: Outputs) -> Tensor:
    """All of them, also where a model keeps its output layer apart."""
    if outputs.logits is None and outputs.unembed is not None:
        return outputs.unembed.logits()
    found: Tensor = outputs["logits"]
    return found
