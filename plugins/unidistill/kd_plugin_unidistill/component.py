"""The three losses as one component: weights, the student's adapter, and checks before the first step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from kd_plugin_unidistill.geometry import Area, box_mask, is_area
from kd_plugin_unidistill.loss import Variant, class_gap, feature_loss, relation_loss, response_loss, weighted
from kdcore import Batch, InputError, Loss, Outputs

Weight = Annotated[float, Field(ge=0)]
READS = {"feature": ("low",), "relation": ("high",), "response": ("heatmap", "regression")}


class UniDistill(Loss):
    """feature * L_fea + relation * L_rel + response * (L_cls + L_reg); the weights default to the paper's C->L ones.

    Outputs read of both models, [B, C, rows along y, columns along x]: ``low`` before the BEV encoder, ``high``
    after it, ``heatmap`` (logits of all classes) and ``regression``; a weight of 0 leaves its maps unread,
    and ``regression = false`` leaves L_reg out. The batch has ``boxes`` (see ``geometry``). ``adapter``: a 1x1
    convolution on the student's ``low``; by default where the channels differ, as the feature loss needs them
    equal. ``teacher_area``: what the teacher's maps cover, where it is not ``area``.
    """

    couples_batch = True
    t_squared = False

    def __init__(
        self,
        *,
        area: Area,
        teacher_area: Area | None = None,
        feature: Weight = 10.0,
        relation: Weight = 5.0,
        response: Weight = 1.0,
        regression: bool = True,
        adapter: bool | None = None,
        clamp: Annotated[float, Field(gt=0, lt=0.5)] = 1e-4,
        variant: Variant = "paper",
    ) -> None:
        super().__init__()
        for name, each in (("area", area), ("teacher_area", teacher_area)):
            if each is not None and not is_area(each):
                raise InputError(f"loss.{name}", "is no rectangle", given=each, allowed="x0 < x1, y0 < y1")
        self.area, self.teacher_area, self.variant = area, teacher_area, variant
        self.weights = {"feature": feature, "relation": relation, "response": response}
        self.regression, self.wanted, self.clamp = regression, adapter, clamp
        self.adapter: nn.Module = nn.Identity()

    def wants(self) -> tuple[str, ...]:
        names = [name for term, weight in self.weights.items() if weight for name in READS[term]]
        names = [name for name in names if name != "regression" or self.regression]
        return tuple(f"{side}.{name}" for side in ("student", "teacher") for name in names)

    def setup(self) -> None:
        student, teacher = self.run.preview(self)
        if self.weights["feature"]:
            mine, theirs = student["low"].shape[1], teacher["low"].shape[1]
            if self.wanted is False and mine != theirs:
                problem = f"the teacher's low maps have {theirs} channels, the student's {mine}"
                raise InputError("loss.adapter", problem, hint="leave adapter out, or feature = 0")
            if self.wanted or mine != theirs:
                self.adapter = nn.Conv2d(mine, theirs, 1)
        if self.weights["response"]:
            self._check_response(student, teacher)

    def _check_response(self, student: Outputs, teacher: Outputs) -> None:
        mine, theirs = student["heatmap"].shape[-2:], teacher["heatmap"].shape[-2:]
        if mine != theirs:
            problem = f"the heads' maps differ: teacher {tuple(theirs)}, student {tuple(mine)} cells"
            raise InputError("loss.response", problem, hint="give both heads one grid, or response = 0")
        if self.regression and student["regression"].shape[1] != teacher["regression"].shape[1]:
            problem = "the heads regress different channels"
            given = {s: o["regression"].shape[1] for s, o in (("student", student), ("teacher", teacher))}
            raise InputError("loss.regression", problem, given=given, hint="regression = false leaves it out")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        boxes, terms = batch["boxes"].to(next(iter(student.named()))[1].device), {}
        where = {"area": self.area, "teacher_area": self.teacher_area, "variant": self.variant}
        if self.weights["feature"]:
            low = self.adapter(student["low"])
            terms["feature"] = feature_loss(low, teacher["low"].detach(), boxes, **where)  # type: ignore[arg-type]
        if self.weights["relation"]:
            high = teacher["high"].detach()
            terms["relation"] = relation_loss(student["high"], high, boxes, **where)  # type: ignore[arg-type]
        if self.weights["response"]:
            terms |= self._response(student, teacher, boxes)
        return {name: self.weights[name.partition("_")[0]] * value for name, value in terms.items()}

    def _response(self, student: Outputs, teacher: Outputs, boxes: Tensor) -> dict[str, Tensor]:
        z_s, z_t = student["heatmap"], teacher["heatmap"].detach()
        if not self.regression:
            mask = box_mask(boxes, self.area, (z_s.shape[-2], z_s.shape[-1]))
            return {"response_cls": weighted(class_gap(z_s, z_t, self.clamp), mask)}
        maps = student["regression"], teacher["regression"].detach()
        found = response_loss(z_s, z_t, boxes, *maps, area=self.area, clamp=self.clamp)
        return {f"response_{name}": value for name, value in found.items()}
