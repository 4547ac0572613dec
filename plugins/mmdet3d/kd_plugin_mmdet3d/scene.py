"""A batch as mmdetection3d takes it: points, images, calibration, and the boxes as instances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdcore.errors import InputError
from kdcore.types import Batch


def prepared(
    detector: Any, batch: Batch, *, points: bool, image: bool, code_size: int = 7
) -> tuple[dict[str, Any], list[Any]]:
    """The detector's inputs and data samples of a batch, by its own preprocessor.

    Of the batch: ``points``, a list of [N, 3 or more]; ``img`` [B, 3, H, W] with ``lidar2img`` [B, 4, 4]; ``boxes``
    [B, M, 8 or more] (see the README), which only losses read. ``code_size`` 9: boxes with velocities.
    """
    inputs: dict[str, Any] = {}
    if points:
        inputs["points"] = list(_needed(batch, "points"))
    if image:
        inputs["img"] = list(_needed(batch, "img"))
    samples = [sample_of(batch, row, image, code_size) for row in range(len(batch))]
    made = detector.data_preprocessor({"inputs": inputs, "data_samples": samples}, detector.training)
    coors = made["inputs"].get("voxels", {}).get("coors")
    if coors is not None and (not len(coors) or int(coors[-1, 0]) != len(batch) - 1):
        problem = (
            "the last cloud of a batch has no point in range, and mmdet3d counts the batch by its last voxel"
        )
        raise InputError("data.source", problem, hint="leave such scenes out, or put another one last")
    return made["inputs"], made["data_samples"]


def sample_of(batch: Batch, row: int, image: bool, code_size: int) -> Any:
    from mmdet3d.structures import Det3DDataSample
    from mmengine.structures import InstanceData

    sample = Det3DDataSample(metainfo=meta())
    if image:
        height, width = _needed(batch, "img").shape[-2:]
        sample.set_metainfo({"img_shape": (height, width), "ori_shape": (height, width)})
        sample.set_metainfo({"lidar2img": _needed(batch, "lidar2img")[row].detach().cpu().numpy()})
    if "boxes" in batch:
        rows = batch["boxes"][row]
        rows = rows[rows[:, -1] >= 0]
        sample.gt_instances_3d = InstanceData(
            bboxes_3d=lidar_boxes(rows[:, :-1], code_size), labels_3d=rows[:, -1].long()
        )
    return sample


def meta() -> dict[str, Any]:
    from mmdet3d.structures import Box3DMode, LiDARInstance3DBoxes

    return {"box_type_3d": LiDARInstance3DBoxes, "box_mode_3d": Box3DMode.LIDAR}


def lidar_boxes(rows: Tensor, code_size: int) -> Any:
    """LiDARInstance3DBoxes [N, code_size] of rows with x, y, z (bottom), sizes, yaw; zeros for what they lack."""
    from mmdet3d.structures import LiDARInstance3DBoxes

    missing = rows.new_zeros(len(rows), max(code_size - rows.shape[1], 0))
    return LiDARInstance3DBoxes(torch.cat([rows[:, :code_size], missing], 1), box_dim=code_size)


def code_size_of(head: nn.Module) -> int:
    return int(getattr(getattr(head, "bbox_coder", None), "code_size", 7))


def _needed(batch: Batch, name: str) -> Any:
    if name not in batch:
        raise InputError(
            "data.source", f"the detector needs {name!r}, which the batch lacks", allowed=sorted(batch)
        )
    return batch[name]
