"""TopKLD (arXiv 2501.06218), reconstructed, and BitDistiller's CAKLD (arXiv 2402.10631), its closest relative.

p = softmax(z_T), q = softmax(z_S) at temperature 1, T_K the K tokens of largest p. The paper's body was not available:
which direction goes with which set is our reading, and both are offered.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import Batch, InputError, Loss, Outputs, conventions
from kdcore.functional import at_least_float32, forward_kl, reverse_kl

Share = Annotated[float, Field(ge=0, le=1)]
LEAST = -1e30  # in the place of log 0, so that 0 log 0 is 0


def top_mask(log_p: Tensor, k: int) -> Tensor:
    """Bool, of the shape [..., V] of ``log_p``: its k largest entries a row, of equal ones those that come first."""
    if not 0 <= k <= log_p.shape[-1]:
        raise ValueError(f"k = {k} of a vocabulary of {log_p.shape[-1]}")
    if k == 0:
        return torch.zeros_like(log_p, dtype=torch.bool)
    least = log_p.topk(k, dim=-1).values[..., -1:]
    above, equal = log_p > least, log_p == least
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


@conventions(zero_at_teacher=True)
def topkld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: Annotated[int, Field(ge=0)],
    variant: Literal["A", "B"] = "A",
    corrected: bool = True,
) -> Tensor:
    """Sum over T_K of r_i, plus over the rest of f_i: r_i = q_i log(q_i / p_i), f_i = p_i log(p_i / q_i).

    Logits [..., V] of tokens (or classes); returns [...]. ``k``: as the sampler's top-k. Variant A takes the reverse
    direction on the teacher's main modes and the forward one on the tail; B the other way round. ``corrected`` adds
    p_i - q_i to r_i and q_i - p_i to f_i, which makes every element at least 0, and 0 for p_i = q_i alone. The raw sum
    is no divergence: its minimum is not at q = p. k = 0 is forward KL in A, k = V reverse KL.
    """
    lp = F.log_softmax(at_least_float32(teacher_logits.detach()), -1).clamp_min(LEAST)
    lq = F.log_softmax(at_least_float32(student_logits), -1).clamp_min(LEAST)
    p, q = lp.exp(), lq.exp()
    f, r = p * (lp - lq), q * (lq - lp)
    if corrected:
        f, r = f - p + q, r - q + p
    T_K = top_mask(lp, k)
    return torch.where(T_K if variant == "A" else ~T_K, r, f).sum(-1)


topkld_loss.conformance_sample = {"params": {"k": 2}}  # type: ignore[attr-defined]


def cakld_loss(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float) -> Tensor:
    """gamma KL(q || p) + (1 - gamma) KL(p || q); logits [..., V], returns [...]."""
    reverse, forward = (kl(student_logits, teacher_logits) for kl in (reverse_kl, forward_kl))
    return gamma * reverse + (1 - gamma) * forward


class CAKLD(Loss):
    """``cakld_loss`` with gamma the teacher's mean probability of the true tokens in training data, unless it is given.

    Works on token positions [B,L] and on samples [B]; measured once, before training.
    """

    zero_at_teacher = True
    measured: Tensor  # scalar, gamma

    def __init__(self, *, gamma: Share | None = None) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("measured", torch.tensor(-1.0 if gamma is None else gamma))

    def setup(self) -> None:
        if self.gamma is None:
            self.measured.fill_(self._confidence())

    @torch.no_grad()
    def _confidence(self) -> float:
        """The mean over the training split's labelled positions, and over teachers."""
        total, count = 0.0, 0
        for batch in self.run.data("train"):
            for name in self.run.teachers:
                said = self.run.ask(name, batch)
                target = said.target if said.target is not None else batch["target"]
                mine = target >= 0
                p = (
                    said["logits"]
                    .float()
                    .softmax(-1)
                    .gather(-1, target.clamp_min(0).unsqueeze(-1))
                    .squeeze(-1)
                )
                total, count = total + float(p[mine].double().sum()), count + int(mine.sum())
        if not count:
            raise InputError(
                "loss.gamma", "the training split has no true tokens to measure it on", hint="set gamma"
            )
        return total / count

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return cakld_loss(student["logits"], teacher["logits"], gamma=float(self.measured))
