"""The demonstration: DHO against one head on matched data, steps and seeds. ``python -m kd_plugin_dho.demo``.

Every seed draws its own split, labelled images, confused labels and initial weights. "Single head, lambda
tuned" picks its loss weight on the same held-out labels that DHO tunes alpha and beta on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import kdcore
from kd_plugin_dho.student import DualHead
from kdcore.comparison.record import record
from kdcore.shipping import load_student
from kdcore.task import Task

LAMBDAS = (0.1, 0.25, 0.5, 0.75, 0.9)
SINGLE = ["student.tied=true"]


def weighted(share: float) -> list[str]:
    """The labels' term with weight lambda, the teacher's with the rest."""
    return [f"task.weight={share}", f"loss.0.weight={round(1 - share, 6)}"]


ARMS: dict[str, list[str]] = {
    "labels alone": [*SINGLE, *weighted(1.0)],
    "teacher alone": [*SINGLE, *weighted(0.0)],
    **{f"single {share}": [*SINGLE, *weighted(share)] for share in LAMBDAS},
    "single head, PCGrad": [*SINGLE, "loss.0.use=dho.pcgrad"],
    "DHO": [],
    "DHO, released variant": ["loss.0.variant=released"],
}


def one(folder: Path, shots: int, seed: int, arm: str, extra: list[str]) -> dict[str, Any]:
    """Train (or find trained) one arm; its accuracies on tune and test."""
    overrides = [*ARMS[arm], f"data.args.shots={shots}", f"data.args.split_seed={seed}", *extra]
    kdcore.run("dho:digits", out=folder, overrides=overrides, seed=seed, resume=True, force=True)
    student, run = load_student(folder)
    task = Task(run.recipe.task, run.source.data.classes)
    row: dict[str, Any] = {"tune": run.evaluate(student, task, "tune")["accuracy"]}
    row["test"] = run.evaluate(student, task, "test")["accuracy"]
    if arm == "DHO" and isinstance(student, DualHead):
        row |= {"alpha": float(student.alpha), "beta": float(student.beta)}
        for name, alpha in (
            ("DHO, alpha 0.5, beta 1", 0.5),
            ("DHO, label head", 1.0),
            ("DHO, teacher head", 0.0),
        ):
            student.alpha.fill_(alpha)
            student.beta.fill_(1.0)
            row[name] = run.evaluate(student, task, "test")["accuracy"]
        results = json.loads((folder / "results.json").read_text("utf-8"))
        row["teacher"] = results["test"]["main"]["accuracy"]
    return row


def of_seed(folder: Path, shots: int, seed: int, extra: list[str]) -> dict[str, float]:
    """Test accuracy of every arm for one seed."""
    rows = {
        arm: one(folder / arm.replace(", ", "-").replace(" ", "-"), shots, seed, arm, extra) for arm in ARMS
    }
    found = {"teacher": rows["DHO"]["teacher"]}
    found |= {arm: row["test"] for arm, row in rows.items() if not arm.startswith("single 0")}
    singles = {share: rows[f"single {share}"] for share in LAMBDAS}
    found["single head, lambda 0.5"] = singles[0.5]["test"]
    found["single head, lambda tuned"] = singles[max(singles, key=lambda s: singles[s]["tune"])]["test"]
    found |= {name: value for name, value in rows["DHO"].items() if name.startswith("DHO, ")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--out", type=Path, default=Path("runs/dho-demo"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the recipe, KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for shots in args.shots:
        folder = args.out / f"shots-{shots}"
        rows = [of_seed(folder / f"seed-{seed}", shots, seed, args.overrides) for seed in seeds]
        values = {arm: [row[arm] for row in rows] for arm in rows[0]}
        print(f"{shots} labels a class\n\n{record(folder, 'accuracy', seeds, values, ['DHO'])}\n")


if __name__ == "__main__":
    main()
