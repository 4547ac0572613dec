"""The student whose classifier is wider in training than when it is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_makd.loss import released_correct
from kdcore import Batch, InputError, Outputs, Probe, Student
from kdcore.kinds import Deployed


class WiderHead(Student):
    """``backbone`` with a classifier of C + Q outputs in place of the linear layer at the path ``head``.

    ``logits`` [B,C] are its first C outputs, ``aspects`` [B,Q] the others, so every loss and metric on ``logits``
    sees the classes alone. The C rows are the backbone's own, initial weights included; the Q rows lie apart,
    get no gradient unless a loss reads ``aspects``, and are cut off in ``deploy``.
    """

    training_only = ("aspect_head",)
    conformance_sample: ClassVar[dict[str, Any]] = {"params": {"questions": 3}}

    def __init__(
        self, *, backbone: Student, questions: Annotated[int, Field(gt=0)], head: str = "head"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.class_head = _take_out(backbone.model, head)
        self.aspect_head = nn.Linear(self.class_head.in_features, questions)
        self.input_names = backbone.input_names

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    def forward(self, batch: Batch) -> Outputs:
        f = self.backbone(batch)["logits"]  # what the classifier is given
        return Outputs(logits=self.class_head(f), tensors={"aspects": self.aspect_head(f), "embedding": f})

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return self.backbone.inputs(batch)

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        return self.backbone.shapes(inputs)

    def deploy(self) -> nn.Module:
        return Deployed(_Cut(self), self.input_names)


class _Cut(nn.Module):
    """The same backbone and class rows, without the aspect rows."""

    def __init__(self, student: WiderHead) -> None:
        super().__init__()
        self.backbone, self.class_head = student.backbone, student.class_head

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(logits=self.class_head(self.backbone(batch)["logits"]))


class ReleasedAccuracy(Probe):
    """Test accuracy over the C class outputs, and over all C + Q as the released evaluation has it.

    ``aspect_wins`` is the share of images where an aspect output was the largest of all.
    """

    @torch.no_grad()
    def measure(self, run: Any, models: Mapping[str, nn.Module], data: Any) -> dict[str, Any]:
        counts = {"accuracy": 0, "accuracy_released": 0, "aspect_wins": 0}
        student, total = models["student"], 0
        for batch in data.loader("test"):
            seen = batch.to(run.device)
            seen.update({key: seen[name] for key, name in run.recipe.student.view.items()})
            outputs = student(seen)
            z, z_a, y = outputs["logits"], outputs["aspects"], seen["target"]
            counts["accuracy"] += int((z.argmax(-1) == y).sum())
            counts["accuracy_released"] += int(released_correct(z, z_a, y).sum())
            counts["aspect_wins"] += int((z_a.amax(-1) > z.amax(-1)).sum())
            total += len(y)
        return {name: count / max(total, 1) for name, count in counts.items()}


def _take_out(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer at ``path``, whose place an identity takes."""
    modules = dict(model.named_modules())
    taken = modules.get(path)
    if not path or not isinstance(taken, nn.Linear):
        linear = [n for n, m in modules.items() if n and isinstance(m, nn.Linear)]
        problem = "no linear layer at this path of the backbone: only such a classifier can be widened"
        raise InputError("student.head", problem, given=path, allowed=linear)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    return taken
