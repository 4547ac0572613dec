"""CRD: Contrastive Representation Distillation (Tian, Krishnan, Isola; ICLR 2020, arXiv 1910.10699)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcore import Batch, InputError, Loss, Outputs
from kdcore.functional import at_least_float32

from .bank import MemoryBank

EPSILON = 1e-7  # the released code's
Count = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


def nce_loss(scores: Tensor, samples: int, epsilon: float = 0.0) -> Tensor:
    """-log h(positive) - sum log(1 - h(negative)) with h = score / (score + N / M) (Eq. 18 and 19): [B].

    ``scores`` [B, 1 + N], > 0, the positive first; ``samples`` is M, the size of the training set.
    """
    noise = (scores.shape[1] - 1) / samples
    total = scores + noise + epsilon
    positive, negative = scores[:, 0] / total[:, 0], noise / total[:, 1:]
    return -positive.log() - negative.log().sum(1)


class CRD(Loss):
    """The student's ``embedding`` of a sample against the teacher's memory of it and of N others, and vice versa.

    Both sides are projected to ``dim`` and normalised; scores are exp(cosine / temperature). ``negatives`` is N;
    ``sampling`` says which samples may be drawn: of another ``class`` (needs labels), or every other
    ``instance``. ``variant``: in the ``released`` code scores are divided by a constant that is estimated on the
    first batch, so that they are 1 / M on average; the ``paper``'s formula has none. The memory is part of the
    state, and changes after each step. The core gathers the batch over ranks, so that all hold the same memory.
    """

    reads = ("student.embedding", "teacher.embedding")
    couples_batch = True
    scale: Tensor

    def __init__(
        self,
        *,
        dim: Count = 128,
        negatives: Count = 16384,
        temperature: Temperature = 0.07,
        momentum: Share = 0.5,
        sampling: Literal["class", "instance"] = "class",
        variant: Literal["paper", "released"] = "paper",
    ) -> None:
        super().__init__()
        self.dim, self.negatives, self.temperature, self.momentum = dim, negatives, temperature, momentum
        self.sampling, self.variant = sampling, variant
        self.register_buffer("scale", torch.full((2,), float(variant == "paper")))  # 0: not known yet
        self._fresh: tuple[Tensor, ...] = ()

    def setup(self) -> None:
        student, teacher = self.run.preview(self)
        self.project_student = nn.Linear(student["embedding"].flatten(1).shape[1], self.dim)
        self.project_teacher = nn.Linear(teacher["embedding"].flatten(1).shape[1], self.dim)
        self.bank = MemoryBank(*self._training_samples(), self.dim, self.momentum)

    def _training_samples(self) -> tuple[Tensor, Tensor]:
        """Ids and groups of the stream that ends the epoch: one pass over it."""
        key = "target" if self.sampling == "class" else "id"
        rows = [(batch["id"].cpu(), batch[key].cpu()) for batch in self.run.data("train") if key in batch]
        if not rows:
            raise InputError(
                "classics.crd", "the data have no labels", hint='sampling = "instance" needs none'
            )
        ids, groups = (torch.cat(column) for column in zip(*rows, strict=True))
        return ids, groups

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> Tensor:
        rows = self.bank.rows(batch["id"])
        drawn = self.bank.draw(rows, self.negatives, self.run.rng("classics.crd"))
        index = torch.cat([rows[:, None], drawn], 1)
        s = _project(self.project_student, student["embedding"])
        t = _project(self.project_teacher, teacher["embedding"].detach())
        scores = self._scores(s, self.bank.teacher, index), self._scores(t, self.bank.student, index)
        scale = self.scale
        if not scale.all():
            scale = torch.stack([each.detach().mean() for each in scores]) * len(self.bank)
        self._fresh = rows, s.detach(), t.detach(), scale
        epsilon = EPSILON if self.variant == "released" else 0.0
        ours, theirs = (nce_loss(x / z, len(self.bank), epsilon) for x, z in zip(scores, scale, strict=True))
        return ours + theirs

    def _scores(self, anchor: Tensor, memory: Tensor, index: Tensor) -> Tensor:
        """exp(cosine / temperature) of each anchor [B, D] with its rows [B, 1 + N] of a memory [M, D]."""
        return ((anchor @ memory.T).gather(1, index) / self.temperature).exp()

    def after_step(self) -> None:
        """The step's embeddings, as the step saw them, go into the memory."""
        if self._fresh:
            rows, student, teacher, scale = self._fresh
            self.bank.update(rows, student, teacher)
            self.scale.copy_(scale)
            self._fresh = ()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, negatives={self.negatives}, temperature={self.temperature}, variant={self.variant}"


def _project(head: nn.Module, embedding: Tensor) -> Tensor:
    return F.normalize(at_least_float32(head(embedding.flatten(1))))
