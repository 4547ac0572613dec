"""Views as pictures: a row of inputs, rows of views below, each with what teacher and student take it for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdcore.checkpoint import replacing

ROWS = 4  # views of each sample


def moments(count: int, steps: int) -> set[int]:
    """``count`` steps of 1 to ``steps``, evenly spread: the last always, of two or more the first as well."""
    if count < 2:
        return {steps} if count else set()
    return {1 + round(index * (steps - 1) / (count - 1)) for index in range(count)}


def save(path: Path, images: Sequence[Tensor], said: Sequence[tuple[Tensor, Tensor]], title: str) -> None:
    """Write a PNG: ``images`` are rows [n,C,H,W] in [0, 1] (1 or 3 channels), ``said`` the classes [n] by teacher
    and student. Where they disagree the label is red."""
    from matplotlib.figure import Figure

    height, width = images[0].shape[-2:]
    shown = torch.stack([_strip(row) for row in images]).flatten(0, 1)
    size = (1.5 * len(images[0]) * width / height, 1.5 * len(images) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shown.numpy(), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)
    for i, (teacher, student) in enumerate(said):
        for j, (t, s) in enumerate(zip(teacher.tolist(), student.tolist(), strict=True)):
            place = (j * width + 0.5, i * height + 0.5)
            axes.text(*place, f"{t}/{s}", color="lime" if t == s else "red", fontsize=7, va="top")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_bytes(data.getvalue())


def _strip(row: Tensor) -> Tensor:
    """[n,C,H,W] -> [H, n*W, 3], one beside the other."""
    pixels = row.clamp(0, 1).float()
    pixels = pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return torch.cat(list(pixels.permute(0, 2, 3, 1)), 1)
