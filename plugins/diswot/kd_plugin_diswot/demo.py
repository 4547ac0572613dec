"""The demonstration: does the score order students by accuracy after distillation? ``python -m kd_plugin_diswot.demo``.

Every seed draws its own split, training images, teacher and initial weights, and trains every student of the
recipe's space that is within its budget. First table: Kendall's tau-b between a score
and test accuracy after distillation. Second table: that accuracy of the student that a rule chooses.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

import kdcore
from kd_plugin_diswot.space import Score, fitness
from kdcore import recipe as recipes
from kdcore.comparison.record import record
from kdcore.stages import Distill, StageRun

Tree = dict[str, Any]
Rows = list[dict[str, Any]]
RECIPE, METHOD = "diswot:digits", "DisWOT"


def tree_of(seed: int, extra: Sequence[str]) -> Tree:
    tree: Tree = copy.deepcopy(recipes.read(RECIPE, extra).tree)
    tree["data"]["args"]["split_seed"] = tree["seed"] = seed
    return tree


def searched(folder: Path, seed: int, variant: str, extra: Sequence[str]) -> Rows:
    """The scored candidates of one variant, by a run of the search alone."""
    tree = tree_of(seed, extra)
    tree["stage"] = [{**tree["stage"][0], "variant": variant}]
    kdcore.run(tree, out=folder, resume=True)
    rows = json.loads((folder / "stages/search/history.json").read_text("utf-8"))
    return [row for row in rows if row["refused"] is None]


def trained(folder: Path, seed: int, student: Tree, teacher: Path | None, extra: Sequence[str]) -> Tree:
    """Results of one student: with the recipe's loss from a teacher's weights, or from the labels alone.

    One standard stage without a report, of which there would be hundreds; what is trained already is loaded.
    """
    tree = tree_of(seed, extra)
    del tree["stage"]
    tree["student"] = student
    if teacher is None:
        tree["loss"], tree["teacher"] = [], {}
    else:
        del tree["teacher"]["main"]["train"]
        tree["teacher"]["main"]["checkpoint"] = str(teacher)
    run = StageRun(recipes.parse(tree), folder.name, folder)
    results: Tree = Distill().run(run)["results"]
    return results


def teacher_of(folder: Path, seed: int, extra: Sequence[str]) -> Path:
    """The weights of this seed's teacher, which learns from the labels once."""
    table = tree_of(seed, extra)["teacher"]["main"]
    epochs = f"train.epochs={table.pop('train')['epochs']}"
    trained(folder, seed, table, None, [*extra, epochs])
    return folder / "student.safetensors"


def measure(folder: Path, seed: int, extra: Sequence[str]) -> dict[str, list[float]]:
    """Of every candidate: scores (higher is better), costs, accuracies after distillation."""
    found: dict[str, list[float]] = {}
    for variant in ("released", "paper"):
        rows = searched(folder / f"search-{variant}", seed, variant, extra)
        M_r, M_s = ([row[term] for row in rows] for term in ("relation", "semantic"))
        for how in get_args(Score):
            found[f"{variant} {how}"] = fitness(M_r, M_s, how)
    for cost in ("parameters", "flops"):
        found[cost] = [row["costs"][cost] for row in rows]
    main = teacher_of(folder / "teacher", seed, extra)
    table = tree_of(seed, extra)["student"]
    for index, row in enumerate(rows):
        student = {**table, "args": row["arch"]}
        results = trained(folder / f"student-{index}-kd", seed, student, main, extra)
        found.setdefault("kd test", []).append(results["test"]["student"]["accuracy"])
        found.setdefault("kd val", []).append(results["student"]["metrics"]["accuracy"])
    return found


def tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: concordant minus discordant pairs, over the geometric mean of the pairs without ties."""
    a, b = (np.sign(np.subtract.outer(np.asarray(v), np.asarray(v))) for v in (x, y))
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


SCORES = {
    METHOD: "released sum",
    "DisWOT, mean of ranks": "released ranks",
    "relation alone": "released relation",
    "semantic alone": "released semantic",
    "paper's form, sum": "paper sum",
    "paper's form, relation": "paper relation",
    "paper's form, semantic": "paper semantic",
    "more parameters": "parameters",
    "more operations": "flops",
}


def orders(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Kendall's tau of every score with accuracy after distillation; a random order has 0 on average."""
    rows = {name: tau(found[key], found["kd test"]) for name, key in SCORES.items()}
    return rows | {"random order": 0.0}


def choices(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Test accuracy after distillation of the student that each rule chooses."""
    accuracy = found["kd test"]
    rows = {name: accuracy[int(np.argmax(found[key]))] for name, key in SCORES.items()}
    rows["random choice (mean of all)"] = statistics.fmean(accuracy)
    rows["median student"] = statistics.median(accuracy)
    rows["best on val after distillation"] = accuracy[int(np.argmax(found["kd val"]))]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/diswot-demo"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the recipe, KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    found = [measure(args.out / f"seed-{seed}", seed, args.overrides) for seed in seeds]
    for title, metric, rows in (
        ("order", "kendall_tau", [orders(each) for each in found]),
        ("choice", "accuracy", [choices(each) for each in found]),
    ):
        values = {arm: [row[arm] for row in rows] for arm in rows[0]}
        print(f"{title}\n\n{record(args.out / title, metric, seeds, values, [METHOD])}\n")


if __name__ == "__main__":
    main()
