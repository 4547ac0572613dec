"""The demonstration: MST-Distill, its ablations and single-teacher distillation. ``python -m kd_plugin_mst_distill.demo``.

Every seed draws its own split, noise and initial weights. Arms without co-training train the student for as many
epochs more as co-training takes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kdcore
from kdcore import recipe as recipes
from kdcore.comparison.record import record

Tree = dict[str, Any]
RECIPE = "mst-distill:digits"
METHOD = "MST-Distill"


def whole(tree: Tree) -> None:
    """The recipe as it is."""


def stage3(**changes: Any) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        tree["stage"][2].update(changes)

    return change


def random_routing(tree: Tree) -> None:
    tree["router"]["routing"] = "random"


def alone(tree: Tree) -> None:
    """No teacher, and the epochs of co-training on top."""
    tree["train"]["epochs"] += tree["stage"][0]["train"]["epochs"]
    tree["loss"], tree["teacher"] = [], {}
    del tree["router"], tree["stage"]


def single(teacher: str) -> Callable[[Tree], None]:
    """One teacher, trained by itself with the student's own recipe."""

    def change(tree: Tree) -> None:
        losses, table = tree["loss"], tree["teacher"][teacher]
        alone(tree)
        tree["loss"], tree["teacher"] = losses, {teacher: {**table, "train": {}}}

    return change


def cotrained(teacher: str | None) -> Callable[[Tree], None]:
    """The same co-training, then distillation from one of its teachers, or from none."""

    def change(tree: Tree) -> None:
        stage: Tree = {"name": "distill", "use": "distill", "student": {"checkpoint": "@cotrain.student"}}
        if teacher is None:
            stage["loss"] = []
        else:
            stage["teacher"] = {teacher: {"checkpoint": f"@cotrain.{teacher}"}}
            tree["loss"][0]["teacher"] = teacher
        tree["stage"][1:] = [stage]
        del tree["router"]

    return change


ARMS: dict[str, Callable[[Tree], None]] = {
    "labels alone": alone,
    "KD, multimodal teacher": single("both"),
    "KD, other modality": single("other"),
    "co-training, then labels": cotrained(None),
    "co-training, then KD, multimodal": cotrained("both"),
    "co-training, then KD, other modality": cotrained("other"),
    METHOD: whole,
    "MST-Distill, released": stage3(variant="released"),
    "MST-Distill without masks": stage3(masked=False),
    "MST-Distill, random routing": random_routing,
}


def one(folder: Path, seed: int, arm: str, extra: list[str]) -> dict[str, Any]:
    """Train (or find trained) one arm; the test accuracies of its student and of the teachers that it listened to."""
    tree = copy.deepcopy(recipes.read(RECIPE, extra).tree)
    tree["data"]["args"]["split_seed"] = tree["seed"] = seed
    ARMS[arm](tree)
    test = kdcore.run(tree, out=folder, resume=True, force=True).results["test"]
    unused = set(tree["teacher"]) - set(tree["stage"][-1].get("teacher", {})) if "stage" in tree else set()
    return {name: values["accuracy"] for name, values in test.items() if name not in unused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/mst-distill-demo"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the recipe, KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm, rows in results.items():
            folder = args.out / f"seed-{seed}" / arm.replace(", ", "-").replace(" ", "-")
            rows.append(one(folder, seed, arm, args.overrides))
    values = {arm: [row["student"] for row in rows] for arm, rows in results.items()}
    print(record(args.out, "accuracy", seeds, values, [METHOD]))
    for name in results[METHOD][0]:
        print(f"{METHOD}, {name}: {statistics.fmean(row[name] for row in results[METHOD]):.3f}")


if __name__ == "__main__":
    main()
