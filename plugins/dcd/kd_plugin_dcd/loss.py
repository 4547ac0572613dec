"""The losses of Dynamic Contrastive Distillation (arXiv 2207.01426; the authors' meter/modules/KD_loss.py)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore import Batch, Loss, Outputs

Share = Annotated[float, Field(ge=0, le=1)]
Variant = Literal["paper", "released"]
Weighing = Literal["entropy", "none"]


def entropy_share(teacher_logits: Tensor) -> Tensor:
    """e [B]: each list's share of the batch's entropy of softmax(teacher_logits [B,N]); sums to 1.

    Divided by the batch's entropy, not by log N: 1/B for lists of equal entropy, and where none has any.
    """
    log_p = F.log_softmax(teacher_logits.detach().float(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = entropy.sum()
    return torch.where(total > 0, entropy / total.clamp_min(1e-30), 1 / len(entropy))


def confidence(e: Tensor) -> Tensor:
    """r [B], softmax over the batch of (1 - e)^2: large where the teacher is sure; sums to 1."""
    return torch.softmax((1 - e) ** 2, 0)


def dcd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.2,
    weighing: Weighing = "entropy",
    variant: Variant = "paper",
) -> dict[str, Tensor]:
    """alpha sum_i r_i mean_k (z_ik - y_ik)^2 + (1 - alpha) sum_i e_i BCE(y_i, onehot(target_i)).

    Scores y, z [B,N] of the same candidates, ``target`` [B] the match's column. Terms ``match`` and ``labels``, each
    [B] times B, so that the mean over samples is the sum above. The authors' T^2 MSE(z/T, y/T) does not depend on
    T, so there is no T. ``variant = "released"``: r multiplies an MSE over the whole batch, and so has no effect.
    ``weighing = "none"``: 1/B in place of e and r.
    """
    y, z = student_logits.float(), teacher_logits.detach().float()
    e = entropy_share(z) if weighing == "entropy" else torch.full_like(y[:, 0], 1 / len(y))
    r = confidence(e)
    d = (z - y).square().mean(1)
    d = d.mean() * torch.ones_like(d) if variant == "released" else d * r * len(y)
    hit = torch.zeros_like(y).scatter(1, target[:, None], 1.0)
    nll = F.binary_cross_entropy_with_logits(y, hit, reduction="none").mean(1) * e * len(y)
    return {"match": alpha * d, "labels": (1 - alpha) * nll}


def wsl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.2,
    variant: Variant = "paper",
) -> dict[str, Tensor]:
    """alpha w_i mean_k (z_ik - y_ik)^2 + CE(y_i, target_i), with w_i = 1 - exp(-CE(y_i) / CE(z_i)), detached.

    Scores [B,N], ``target`` [B]; terms ``match`` and ``labels`` [B]. w is large where the student lags the teacher.
    ``variant = "released"``: w multiplies the MSE over the whole batch.
    """
    y, z = student_logits.float(), teacher_logits.detach().float()
    nll = F.cross_entropy(y, target, reduction="none")
    w = 1 - torch.exp(-nll.detach() / (F.cross_entropy(z, target, reduction="none") + 1e-7))
    d = (z - y).square().mean(1)
    d = d.mean() if variant == "released" else d
    return {"match": alpha * w * d, "labels": nll}


class DCD(Loss):
    """``dcd_loss`` on the candidates that the student sees; holds the labels' term itself.

    ``variant = "released"`` compares the student's scores, match first, with the teacher's in descending order, as the
    authors' code does: ``top_scores`` of the selection, or else the teacher's scores of the student's candidates.
    """

    hard_term = True
    mean_over_classes = True

    def __init__(
        self, *, alpha: Share = 0.2, weighing: Weighing = "entropy", variant: Variant = "paper"
    ) -> None:
        super().__init__()
        self.alpha, self.weighing, self.variant = alpha, weighing, variant
        self.couples_batch = weighing == "entropy" or variant == "released"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        y, z, target = _scores(student, teacher, batch, self.variant)
        return dcd_loss(y, z, target, alpha=self.alpha, weighing=self.weighing, variant=self.variant)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, weighing={self.weighing}, variant={self.variant}"


class WSL(Loss):
    """``wsl_loss`` on the candidates that the student sees; in the authors' file, and not used by their training."""

    hard_term = True
    mean_over_classes = True  # of the matched scores

    def __init__(self, *, alpha: Share = 0.2, variant: Variant = "paper") -> None:
        super().__init__()
        self.alpha, self.variant = alpha, variant
        self.couples_batch = variant == "released"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        y, z, target = _scores(student, teacher, batch, self.variant)
        return wsl_loss(y, z, target, alpha=self.alpha, variant=self.variant)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, variant={self.variant}"


def _scores(
    student: Outputs, teacher: Outputs, batch: Batch, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """y, z and target: z of the same candidates as y, or as the released code pairs them."""
    z = teacher["logits"]
    if variant == "released":
        z = batch["top_scores"] if "top_scores" in batch else z.sort(1, descending=True).values
    return student["logits"], z, batch["target"]
