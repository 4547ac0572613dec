"""The student with S outputs a class, and the rule that makes C classes of them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from kdcore import Batch, InputError, Outputs, Student


class Subclassed(Student):
    """``backbone`` with its last linear layer (at path ``head``) made ``subclasses`` times as wide.

    Gives ``subclass_logits`` u [B,C,S] and ``logits`` logsumexp_s u [B,C], whose softmax is the summed
    probability P(c) = sum_s softmax(u)_{c,s}: the inference rule. The largest of the C*S outputs may belong to
    another class. A label loss on ``logits`` is CE(y, P); with ``subclasses = 1`` it is the backbone itself.
    """

    backbone: Student

    def __init__(
        self, *, backbone: Student, subclasses: Annotated[int, Field(ge=1)] = 5, head: str = "head"
    ) -> None:
        super().__init__()
        self.backbone, self.subclasses = backbone, subclasses
        self.classes = widen(backbone.model, head, subclasses)
        self.input_names = backbone.input_names

    def forward(self, batch: Batch) -> Outputs:
        u = self.backbone(batch)["logits"].unflatten(1, (self.classes, self.subclasses))
        return Outputs(logits=u.logsumexp(2), tensors={"subclass_logits": u})

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return self.backbone.inputs(batch)

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        return self.backbone.shapes(inputs)


def widen(model: nn.Module, path: str, times: int) -> int:
    """Replace the linear layer at ``path`` by a new one with ``times`` as many outputs; returns how many it had."""
    found = dict(model.named_modules()).get(path)
    if not path or not isinstance(found, nn.Linear):
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise InputError(
            "student.head", "no linear layer of the backbone at this path", given=path, allowed=linear
        )
    parent, _, name = path.rpartition(".")
    wide = nn.Linear(found.in_features, times * found.out_features, bias=found.bias is not None)
    setattr(model.get_submodule(parent), name, wide.to(found.weight))
    return found.out_features
