"""The components: a detector of mmdetection3d as a teacher and as a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_mmdet3d import around, export, families, heads, scene
from kd_plugin_mmdet3d.load import load_detector, quiet
from kdcore.kinds import Kind, Student, Teacher
from kdcore.types import Batch, Outputs

Count = Annotated[int, Field(gt=0)]


class Wrapped(Kind):
    """A detector behind the core's contract.

    Outputs: ``logits`` and ``heatmap`` (one map of class logits), ``regression``, ``low`` and ``high`` (the maps before
    and after the BEV encoder), all [B, C, rows along y, columns along x] and untouched by the losses, and ``head.N``,
    the head's own tensors.
    """

    detector: Any
    most: int
    _spec: Any = None

    def wrap(self, detector: nn.Module, most: int, place: str) -> None:
        self.family = families.family_of(detector, place)
        self.detector, self.most = detector, most
        heads.check_head(self.head, place)

    @property
    def model(self) -> nn.Module:
        return self.detector  # type: ignore[no-any-return]

    @property
    def head(self) -> nn.Module:
        return getattr(self.detector, self.family.head)  # type: ignore[no-any-return]

    def forward(self, batch: Batch) -> Outputs:
        with quiet(), families.watched(self.detector, self.family) as seen:
            inputs, samples = self.prepared(batch)
            said = self.head(families.features(self.detector, self.family, inputs, samples))
        answer = heads.response(self.head, said)
        tensors, self._spec = heads.flat(said)
        return Outputs(logits=answer["heatmap"], tensors={**tensors, **answer, **seen})

    def prepared(self, batch: Batch) -> tuple[dict[str, Any], list[Any]]:
        """What mmdet3d calls inputs and data samples; a detector is given the sensors that it has, and no other."""
        points = families.takes_points(self.detector)
        image = families.takes_image(self.detector, self.family)
        return scene.prepared(
            self.detector, batch, points=points, image=image, code_size=scene.code_size_of(self.head)
        )

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        """``boxes`` [B, max_boxes, 9]: the detector's own decoding and non-maximum suppression."""
        said = heads.whole(outputs.tensors, self._spec)
        metas = [scene.meta() for _ in outputs["heatmap"]]
        with quiet():
            return {"boxes": heads.predictions(self.head, said, metas, self.most)}


class MMDet3DTeacher(Wrapped, Teacher):
    """A detector of mmdetection3d as a teacher.

    ``config``: a model's table, the path of an OpenMMLab config file (``.py``: Python, which is run), the name of one
    of mmdet3d's own without ``.py``, or ``module:function`` with ``args``. ``options``: dotted keys over it.
    ``checkpoint``: weights of exactly this model. ``max_boxes``: detections kept of a scene.
    """

    def __init__(
        self,
        *,
        config: str | dict[str, Any],
        args: dict[str, Any] = {},  # noqa: B006 - read only; the schema shows the default
        options: dict[str, Any] = {},  # noqa: B006
        checkpoint: str | None = None,
        max_boxes: Count = 32,
    ) -> None:
        super().__init__()
        self.wrap(load_detector(config, args, options, checkpoint, "teacher"), max_boxes, "teacher")

    def trainee(self) -> Student:
        return _Trainee(self)


class MMDet3DStudent(Wrapped, Student):
    """A detector of mmdetection3d as a student; the parameters are the teacher's. Its loss is the detector's own."""

    def __init__(
        self,
        *,
        config: str | dict[str, Any],
        args: dict[str, Any] = {},  # noqa: B006
        options: dict[str, Any] = {},  # noqa: B006
        checkpoint: str | None = None,
        max_boxes: Count = 32,
    ) -> None:
        super().__init__()
        self.wrap(load_detector(config, args, options, checkpoint, "student"), max_boxes, "student")

    def task_loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The head's losses by name, on clones of its maps: the outputs stay raw logits."""
        size, image = scene.code_size_of(self.head), families.takes_image(self.detector, self.family)
        with quiet():
            samples = [scene.sample_of(batch, row, image, size) for row in range(len(batch))]
            return heads.losses(self.head, heads.whole(outputs.tensors, self._spec), samples)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the graph takes: padded voxels, or an image and the cells' places in it. Refused where nothing can."""
        self.deploy()
        raw, settings = self._raw(batch), export.settings(self.detector, self.family, self.most)
        return {name: torch.from_numpy(value) for name, value in around.before(raw, settings).items()}

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        return {name: ("batch", *value.shape[1:]) for name, value in inputs.items()}, {"batch": (1, 8)}

    def graph(self, outputs: Outputs) -> dict[str, Tensor]:
        """The head's raw maps: boxes are decoded outside the graph."""
        return {n.replace(".", "_"): v for n, v in outputs.tensors.items() if n.startswith("head.")}

    def host(self, batch: Batch) -> tuple[str, dict[str, Any]]:
        return export.source(self.detector, self.family, self.most), self._raw(batch)

    def deploy(self) -> nn.Module:
        return export.core_of(self.detector, self.family).train(self.training)

    def _raw(self, batch: Batch) -> dict[str, Any]:
        """A receiver's inputs: clouds, or images with their calibration."""
        if not self.family.volume:
            return {"points": [cloud.cpu().numpy() for cloud in batch["points"]]}
        return {name: batch[name].cpu().numpy() for name in ("img", "lidar2img")}

    def parameters_to_ship(self) -> dict[str, Tensor]:
        """The weights under mmdetection3d's names."""
        return dict(self.detector.state_dict())


class _Trainee(MMDet3DStudent):
    """A teacher's own detector, trained on the task."""

    def __init__(self, teacher: MMDet3DTeacher) -> None:
        Student.__init__(self)
        self.wrap(teacher.detector, teacher.most, "teacher")
