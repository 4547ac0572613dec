"""How far apart student and teacher are at the boxes of held-out scenes, in finished runs.

``python -m kd_plugin_unidistill.gaps COMPARISON [--area X0 Y0 X1 Y1]`` prints a line for each arm of a comparison's
folder: means over its seeds of the relation gap and of the response gap, on the validation split, unweighted.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from kd_plugin_unidistill.geometry import Area, box_mask
from kd_plugin_unidistill.loss import class_gap, relation_loss, weighted
from kdcore.building import Builder
from kdcore.checkpoint import load_tensors
from kdcore.shipping import load_student


@torch.no_grad()
def gaps(folder: Path, teacher_of: Path, area: Area) -> dict[str, float]:
    """The gaps of one run's student to the teacher of another run (``teacher_of``: its folder), on the same scenes."""
    student, run = load_student(folder)
    recipe, places = load_student(teacher_of)[1].recipe, sorted(teacher_of.glob("stages/*/teacher-main"))
    table = recipe.teacher["main"]
    teacher = Builder(0).make("teacher", table.use, table.params, "teacher.main")
    teacher.load_state_dict(load_tensors(places[0] / "teacher.safetensors", "teacher.main"))
    teacher.eval()
    found: dict[str, list[float]] = {"relation": [], "response": []}
    for batch in run.source.loader("val"):
        s, t, boxes = student(batch), teacher(batch), batch["boxes"]
        found["relation"].append(float(relation_loss(s["high"], t["high"], boxes, area=area)))
        mask = box_mask(boxes, area, (s["heatmap"].shape[-2], s["heatmap"].shape[-1]))
        found["response"].append(float(weighted(class_gap(s["heatmap"], t["heatmap"]), mask)))
    return {name: statistics.mean(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--area", type=float, nargs=4, default=[0.0, -12.8, 25.6, 12.8])
    options = parser.parse_args()
    area: Area = tuple(options.area)
    arms = sorted(path for path in (options.comparison / "runs").iterdir() if path.is_dir())
    taught = next(path for path in arms if list(path.glob("*/stages/*/teacher-main/teacher.safetensors")))
    teacher_of = sorted(taught.glob("seed-*"))[0]
    for arm in arms:
        rows = [gaps(path.parent, teacher_of, area) for path in sorted(arm.glob("seed-*/results.json"))]
        means = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        print(arm.name, ", ".join(f"{name} {value:.3f}" for name, value in means.items()))


if __name__ == "__main__":
    main()
