"""The inference rule of a student that was trained on rescaled logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kd_plugin_mix_kd.loss import rescale
from kdcore import Batch, Outputs, Student


class Rescaled(Student):
    """``backbone``, whose metrics and exported graph take the rescaled logits, as the authors' validation does.

    The training leaves the scale of the raw logits open, so their softmax means nothing. The decision (argmax)
    is the same either way.
    """

    backbone: Student

    def __init__(self, *, backbone: Student) -> None:
        super().__init__()
        self.backbone = backbone
        self.input_names = backbone.input_names

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    def forward(self, batch: Batch) -> Outputs:
        outputs: Outputs = self.backbone(batch)
        return outputs

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        said = self.backbone.infer(outputs)
        return {**said, "logits": rescale(said["logits"])}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return self.backbone.inputs(batch)

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        return self.backbone.shapes(inputs)
