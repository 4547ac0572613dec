"""Heads: their maps in one form, their losses and their boxes. Heads write in place, so they get clones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from kdcore.errors import InputError

REGRESSION = ("reg", "height", "dim", "rot", "vel")  # of CenterHead, as far as a head has them


def is_center(head: nn.Module) -> bool:
    return any(each.__name__ == "CenterHead" for each in type(head).__mro__)


def check_head(head: nn.Module, place: str) -> None:
    names = [each.__name__ for each in type(head).__mro__]
    if not {"CenterHead", "Anchor3DHead"} & set(names):
        raise InputError(
            f"{place}.config",
            "a head that this plugin does not know",
            given=names[0],
            allowed="CenterHead, Anchor3DHead",
        )


def response(head: nn.Module, said: Any) -> dict[str, Tensor]:
    """``heatmap``, class logits [B, K, H, W], and ``regression`` [B, R, H, W] of a head's answer.

    CenterHead: all tasks' classes, and each task's offsets, height, size, rotation and velocity. Anchor3DHead:
    anchors times classes, and anchors times box codes. Of several levels, the finest.
    """
    if is_center(head):
        tasks = [task[0] for task in said]
        parts = [task[name] for task in tasks for name in REGRESSION if name in task]
        return {
            "heatmap": torch.cat([task["heatmap"] for task in tasks], 1),
            "regression": torch.cat(parts, 1),
        }
    return {"heatmap": said[0][0].clone(), "regression": said[1][0].clone()}


def flat(said: Any) -> tuple[dict[str, Tensor], TreeSpec]:
    """A head's answer as named tensors, and what puts them together again."""
    leaves, spec = tree_flatten(said)
    return {f"head.{i}": leaf for i, leaf in enumerate(leaves)}, spec


def whole(tensors: dict[str, Tensor], spec: TreeSpec) -> Any:
    """A head's answer again, of clones: losses and decoding take sigmoids in place."""
    return tree_unflatten([tensors[f"head.{i}"].clone() for i in range(spec.num_leaves)], spec)


def losses(head: Any, said: Any, samples: list[Any]) -> dict[str, Tensor]:
    """The head's own losses by name, each a scalar; what has no "loss" in its name is no loss."""
    truth = [each.gt_instances_3d for each in samples]
    if is_center(head):
        found = head.loss_by_feat(said, truth)
    else:
        found = head.loss_by_feat(*said, truth, [each.metainfo for each in samples], [None] * len(samples))
    summed = {n: torch.stack(v).sum() if isinstance(v, list) else v for n, v in found.items() if "loss" in n}
    return {name.replace("loss_", "").replace(".", "_"): value for name, value in summed.items()}


def predictions(head: Any, said: Any, metas: list[dict[str, Any]], most: int) -> Tensor:
    """[B, most, 9]: x, y, z of the bottom, dx, dy, dz, yaw, score, label; best first, label -1 where there is none."""
    found = (
        head.predict_by_feat(said, metas)
        if is_center(head)
        else head.predict_by_feat(*said, batch_input_metas=metas)
    )
    return torch.stack([_padded(each, most) for each in found])


def _padded(instances: Any, most: int) -> Tensor:
    boxes, scores = instances.bboxes_3d.tensor[:, :7], instances.scores_3d
    best = scores.argsort(descending=True, stable=True)[:most]
    rows = torch.cat([boxes, scores[:, None], instances.labels_3d[:, None].to(boxes)], 1)[best]
    out = rows.new_zeros(most, 9)
    out[:, -1] = -1
    out[: len(rows)] = rows
    return out
