"""LELP's loss: one cross-entropy over S pseudo-subclasses of each of C classes (arXiv 2409.20449)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_lelp.subspaces import Subspaces, fit_subspaces, moments, random_subspaces, split_within
from kdcore import Batch, InputError, Loss, Outputs
from kdcore.checkpoint import load_tensors
from kdcore.functional import at_least_float32

Positive = Annotated[float, Field(gt=0)]


def lelp_targets(teacher_logits: Tensor, q: Tensor, *, temperature: float = 1.0) -> Tensor:
    """p(c,s) = softmax(z_T / tau)_c q(s|c): [B,C] and [B,C,S] to [B,C,S]; its sum over s is the teacher's softmax."""
    p = F.softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    return p.unsqueeze(-1) * q


def lelp_loss(
    student_subclass_logits: Tensor, teacher_logits: Tensor, q: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """-tau^2 sum_{c,s} p(c,s) log softmax(u / tau)_{c,s}; u [B,C,S], z_T [B,C], q(s|c) [B,C,S]; returns [B].

    At tau = 1 it is CE(p_T, P_S) + sum_c p_T(c) CE(q(.|c), Q_S(.|c)): class distillation and a term within classes.
    Its smallest value is the targets' entropy, not 0. No gradient to the teacher or to q; float32 at least.
    """
    p = lelp_targets(teacher_logits, q.detach(), temperature=temperature)
    log_u = F.log_softmax(at_least_float32(student_subclass_logits).flatten(1) / temperature, dim=-1)
    return -(p.flatten(1) * log_u).sum(-1) * temperature**2


class LELPLoss(Loss):
    """``lelp_loss`` with the subspaces of the teacher's embeddings, fitted before the first step.

    Fitting is one pass over the training split, without gradient: each class's mean, covariance and top S
    directions outside the row space of W, the weight of the teacher's last linear layer, turned by a random
    rotation. ``head``: that layer's path in the teacher; the recipe has ``reads.teacher.embedding = "HEAD.in"``.
    Classes are the labels, or the teacher's where the batch has none. ``subspaces``: a file of the stage
    ``lelp.fit`` in place of the pass. ``axes = "random"`` is a control: directions drawn at random. ``of``: which
    teacher, where there are several. Mean, directions and scale are buffers, so a resumed run has the same
    targets. In training, embeddings are the teacher's of the batch as it is then, augmented or not.
    """

    reads = ("student.subclass_logits", "teacher.logits", "teacher.embedding")
    mean: Tensor
    directions: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        temperature: Positive = 1.0,
        beta: Positive = 1.0,
        head: str = "head",
        null_space: bool = True,
        rotate: bool = True,
        axes: Literal["principal", "random"] = "principal",
        standardise: bool = True,
        subspaces: str | None = None,
        of: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.beta, self.head = temperature, beta, head
        self.null_space, self.rotate, self.standardise = null_space, rotate, standardise
        self.file, self.of, self.axes = subspaces, of, axes

    def setup(self) -> None:
        student, teacher = self.run.preview(self)
        shape = student["subclass_logits"].shape[1:]
        found = self._fit(shape[1]) if self.file is None else read_subspaces(self.file)
        wanted = (shape[0], teacher["embedding"].shape[1], shape[1])
        if found.directions.shape != wanted:
            given = f"classes, width, subclasses: {tuple(found.directions.shape)}"
            raise InputError("loss.subspaces", "do not fit student and teacher", given=given, allowed=wanted)
        for name, value in found._asdict().items():
            self.register_buffer(name, value)

    def _fit(self, subclasses: int) -> Subspaces:
        names = [self.of] if self.of else list(self.run.teachers)
        if len(names) != 1 or names[0] not in self.run.teachers:
            allowed = list(self.run.teachers)
            raise InputError("loss.of", "name one teacher", given=self.of, allowed=allowed)
        weight = weight_of(self.run.teachers[names[0]].model, self.head, "loss.head")
        found = moments(self._embeddings(names[0]), len(weight))
        outside, generator = weight if self.null_space else None, self.run.rng("lelp rotation")
        if self.axes == "random":
            return random_subspaces(found, outside, subclasses, generator)
        return fit_subspaces(found, outside, subclasses, generator if self.rotate else None)

    @torch.no_grad()
    def _embeddings(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(h, class) of the training split's batches."""
        for batch in self.run.data("train"):
            said = self.run.ask(name, batch)
            if f"{self.head}.in" not in said:
                hint = f'reads.teacher.embedding = "{self.head}.in"'
                raise InputError("loss.reads.teacher", f"nobody taps the input of {self.head!r}", hint=hint)
            yield said[f"{self.head}.in"], batch["target"] if "target" in batch else said["logits"].argmax(1)

    def split(self, h: Tensor) -> Tensor:
        """q(s|c), [B,C,S], of embeddings [B,D]."""
        found = Subspaces(self.mean, self.directions, self.scale)
        return split_within(h, found, beta=self.beta, standardise=self.standardise)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        q = self.split(teacher["embedding"])
        return lelp_loss(student["subclass_logits"], teacher["logits"], q, temperature=self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, beta={self.beta}, null_space={self.null_space}"


class GivenSplit(Loss):
    """A control: ``lelp_loss`` with subclasses that the data name instead of the teacher's directions.

    ``key``: a batch value int64 [B], c * S + s for subclass s of class c. q(.|c) is one-hot at s, and uniform for
    every other class. With true subclasses this is an upper bound; random ones show what a wider head does by itself.
    """

    reads = ("student.subclass_logits", "teacher.logits")

    @staticmethod
    def conformance_sample() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        u, z = (torch.randn(shape, generator=generator) for shape in ((6, 3, 4), (6, 3)))
        batch = Batch({"id": torch.arange(6), "target": torch.arange(6) % 3, "topic": 2 * torch.arange(6)})
        student = Outputs(logits=u.logsumexp(2), tensors={"subclass_logits": u})
        return {"params": {"key": "topic"}, "student": student, "teacher": Outputs(logits=z), "batch": batch}

    def __init__(self, *, key: str, temperature: Positive = 1.0) -> None:
        super().__init__()
        self.key, self.temperature = key, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        u = student["subclass_logits"]
        B, C, S = u.shape
        slot = F.one_hot(batch[self.key], C * S).view(B, C, S)
        q = torch.where(slot.any(2, keepdim=True), slot.to(u.dtype), 1 / S)
        return lelp_loss(u, teacher["logits"], q, temperature=self.temperature)


def weight_of(model: nn.Module, path: str, place: str) -> Tensor:
    """W [C,D] of the linear layer at ``path``."""
    found = dict(model.named_modules()).get(path)
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise InputError(place, "no linear layer of the teacher at this path", given=path, allowed=linear)
    return weight


def read_subspaces(path: str) -> Subspaces:
    tensors = load_tensors(path, "loss.subspaces")
    if set(tensors) != set(Subspaces._fields):
        raise InputError("loss.subspaces", "not a file of lelp.fit", given=path, allowed=Subspaces._fields)
    return Subspaces(**tensors)
