"""The demonstration: the learned ratio against fixed ones and against labels alone. ``python -m kd_plugin_tgeo_kd.demo``.

Every seed draws its own split, noise and initial weights; its teacher is the same in all of its arms. The method sees
all of the labels, some through its outer loss, so arms without a held-out part see all of them, too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch

import kdcore
from kdcore import recipe as recipes
from kdcore.comparison.record import record
from kdcore.report import read_metrics
from kdcore.shipping import load_student
from kdcore.task import Task

Tree = dict[str, Any]
RECIPE, METHOD = "tgeo-kd:digits", "TGeo-KD"
FIXED = (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)


def labels(tree: Tree) -> None:
    """No teacher."""
    del tree["router"]
    tree["loss"], tree["teacher"] = [], {}


def fixed(tree: Tree, alpha: float) -> None:
    """One ratio for all samples: alpha L_KD + (1 - alpha) L_GT."""
    del tree["router"]
    tree["task"] = {"weight": 1 - alpha}
    tree["loss"][0]["weight"] = alpha


def recipe_of(arm: str, seed: int, extra: list[str]) -> Tree:
    tree: Tree = copy.deepcopy(recipes.read(RECIPE, extra).tree)
    tree["seed"] = tree["data"]["args"]["split_seed"] = seed
    tree["teacher"]["main"]["data"]["args"]["split_seed"] = seed
    if arm.startswith("labels"):
        labels(tree)
    if arm.startswith("fixed"):
        fixed(tree, float(arm.split()[1].strip(",")))
    if arm.endswith("all labels"):
        tree["data"]["tune"] = 0.0
    if arm.endswith("untrained"):
        tree["router"]["optimizer"] = {"use": "Adam", "lr": 0.0}
    if arm.endswith("released"):
        tree["router"]["variant"] = "released"
    return tree


def one(folder: Path, arm: str, seed: int, extra: list[str]) -> dict[str, float]:
    """Train (or find trained) one arm: its accuracy on test, its loss on held-out labels, where there are some."""
    tree = recipe_of(arm, seed, extra)
    out = folder / arm.replace(", ", "-").replace(" ", "-")
    test = kdcore.run(tree, out=out, resume=True, force=True).results["test"]
    row = {"accuracy": test["student"]["accuracy"], "teacher": test.get("main", {}).get("accuracy", 0.0)}
    if tree["data"]["tune"]:
        student, run = load_student(out)
        task = Task(run.recipe.task.model_copy(update={"metrics": ["loss"]}), 10)
        row["held-out loss"] = run.evaluate(student, task, "tune")["loss"]
    if arm == METHOD:
        logged = read_metrics(out / "stages/distill/student/metrics.jsonl")[-5:]  # the last 40 steps
        for name in ("tgeo_alpha_right", "tgeo_alpha_wrong"):
            row[name] = statistics.fmean(each[name] for each in logged if name in each)
    return row


def of_seed(folder: Path, seed: int, extra: list[str]) -> dict[str, dict[str, float]]:
    ratios = [f"fixed {alpha}" for alpha in FIXED]
    arms = [METHOD, "labels", "labels, all labels", *ratios, "f untrained", "f released"]
    found = {arm: one(folder, arm, seed, extra) for arm in arms}
    best = min(ratios, key=lambda arm: found[arm]["held-out loss"])
    found["fixed, tuned"] = found[best]
    found["fixed, tuned, all labels"] = one(folder, f"{best}, all labels", seed, extra)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/tgeo-kd-demo"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the recipe, KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows = [of_seed(args.out / f"seed-{seed}", seed, args.overrides) for seed in seeds]
    values = {arm: [row[arm]["accuracy"] for row in rows] for arm in rows[0]}
    print(record(args.out, "accuracy", seeds, values, [METHOD]))
    for name in ("teacher", "tgeo_alpha_right", "tgeo_alpha_wrong"):
        print(f"{name}: {statistics.fmean(row[METHOD][name] for row in rows):.4f}")


if __name__ == "__main__":
    main()
