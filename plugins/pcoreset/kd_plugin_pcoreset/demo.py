"""The demonstration: what to buy labels for, under the same distillation. ``python -m kd_plugin_pcoreset.demo``.

Every seed draws its own classes, pool, first labels and teacher; within a seed all arms begin with the same. Three
tables: the mean test accuracy after the purchases (the area under the curve), that of the last student, and how evenly
the bought labels spread over the classes (entropy over its largest value).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

import kdcore
from kd_plugin_pcoreset.stages import bought
from kdcore.comparison.record import record
from kdcore.shipping import load_run
from kdcore.stages import StageRun

ALONE = ["loss=[]", "student.alpha=1.0", "task.weight=1.0"]  # the label head by itself
BUY = "augmentation.0.strategy="
ARMS: dict[str, list[str]] = {
    "random": [f"{BUY}random"],
    "entropy": [f"{BUY}entropy"],
    "CoreSet": [f"{BUY}coreset"],
    "PCoreSet": [],
    "nearest": [f"{BUY}nearest"],
    "random, no distillation": [f"{BUY}random", *ALONE],
    "PCoreSet, no distillation": ALONE,
}
OVERLAP = [  # ten classes that overlap, a balanced pool
    *(
        f"{place}.args.{key}"
        for place in ("data", "teacher.main")
        for key in ("supers=1", "each=10", "noise=2.0")
    ),
    *(
        "data.args.tail=0.0",
        "data.args.size=1500",
        "augmentation.0.queries=10",
        "student.backbone.args.classes=10",
    ),
]
Row = dict[str, float]


def spread(run: StageRun) -> float:
    """Entropy of the classes of what was bought, over log C."""
    classes = int(run.source.data.classes or 0)
    values = run.source.streams["labelled"].values
    rows = torch.isin(values["id"], torch.tensor([i for ids in bought(run.folder) for i in ids]))
    p = np.bincount(values["target"][rows].numpy(), minlength=classes) / int(rows.sum())
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(classes))


def one(folder: Path, seed: int, arm: str, extra: list[str]) -> Row:
    """Run (or find) one arm; its numbers, and the teacher's accuracy."""
    place = [f"{name}.args.split_seed={seed}" for name in ("data", "teacher.main")]
    kdcore.run(
        "pcoreset:structured", out=folder, overrides=[*extra, *ARMS[arm], *place], seed=seed, resume=True
    )
    left = json.loads((folder / "stages/rounds/artefacts.json").read_text("utf-8"))
    curve = [row["accuracy"] for row in left["test"]]
    evenly = spread(load_run(folder)[1])
    row = {"mean": statistics.fmean(curve[1:]), "last": curve[-1], "spread": evenly}
    teacher = left["results"]["test"].get("main", {}).get("accuracy", float("nan"))
    return {**row, "first": curve[0], "teacher": teacher}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--overlap", action="store_true", help="classes that overlap, where it should not help"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/pcoreset-demo"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the recipe, KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    extra = [*(OVERLAP if args.overlap else []), *args.overrides]
    rows = {
        arm: [
            one(args.out / f"seed-{seed}" / arm.replace(", ", "-").replace(" ", "-"), seed, arm, extra)
            for seed in seeds
        ]
        for arm in ARMS
    }
    for name in ("first", "teacher"):
        print(f"{name}: {statistics.fmean(row[name] for row in rows['PCoreSet']):.3f}")
    for name, metric in {"mean": "mean_accuracy", "last": "accuracy", "spread": "label_entropy"}.items():
        values = {arm: [row[name] for row in of_arm] for arm, of_arm in rows.items()}
        print(f"\n{name}\n\n{record(args.out / name, metric, seeds, values, ['PCoreSet'])}")


if __name__ == "__main__":
    main()
