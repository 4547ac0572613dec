"""The two distances as a loss of the distillation that follows the search ("DisWOT+dagger" of the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from kd_plugin_diswot.looks import weight_of
from kd_plugin_diswot.metrics import activation_distance, class_maps, relation_distance
from kdcore import Batch, Loss, Outputs

Weight = Annotated[float, Field(ge=0)]


class DisWOTLoss(Loss):
    """``semantic`` M_s / N^2 + ``relation`` M_r / B^2, in the paper's form; beside CE and KL.

    Reads ``feature`` of both, the activations before global pooling, and the weights of both last layers, which
    are at ``student_head`` and ``teacher_head`` (paths of modules) and take the features' mean over places. It
    is 0 where features and last layers equal the teacher's.
    A term of weight 0 is left out. Several teachers: the mean.
    """

    reads = ("student.feature", "teacher.feature")
    couples_batch = True
    joint = True

    def __init__(
        self,
        *,
        semantic: Weight = 1.0,
        relation: Weight = 1.0,
        student_head: str = "head",
        teacher_head: str = "head",
    ) -> None:
        super().__init__()
        self.semantic, self.relation = semantic, relation
        self.student_head, self.teacher_head = student_head, teacher_head

    def forward(self, student: Outputs, teacher: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        A_S, count = student["feature"], len(teacher)
        terms: dict[str, Tensor] = {}
        if self.relation:
            each = [relation_distance(A_S, T["feature"], variant="paper") for T in teacher.values()]
            terms["relation"] = self.relation * sum(each, A_S.new_zeros(())) / (count * len(A_S) ** 2)
        if self.semantic:
            maps = class_maps(A_S, self._weight(self.run.student.model, "student"))
            each = [activation_distance(maps, self._maps_of(name, T)) for name, T in teacher.items()]
            terms["semantic"] = self.semantic * sum(each, A_S.new_zeros(())) / (count * maps.shape[1] ** 2)
        return terms

    def _maps_of(self, name: str, outputs: Outputs) -> Tensor:
        weight = self._weight(self.run.teachers[name].model, "teacher")
        return class_maps(outputs["feature"].detach(), weight.detach())

    def _weight(self, model: nn.Module, side: str) -> Tensor:
        # looked up at each step: the module itself belongs to the model
        return weight_of(model, getattr(self, f"{side}_head"), f"{self.place}.{side}_head")
