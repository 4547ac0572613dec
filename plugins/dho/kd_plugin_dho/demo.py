"""The demonstration: DHO against one head on matched data, steps and seeds. ``python -m kd_plugin_dho.demo``.

Every seed draws its own split, labelled images, confused labels and initial weights. "Single head, lambda
tuned" picks its loss weight on the same held-out labels that DHO tunes alpha and beta on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from scipy import stats

import kdcore
from kd_plugin_dho.student import DualHead
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


def table(results: Mapping[int, list[dict[str, float]]]) -> str:
    """Markdown: an arm a line, mean ± standard deviation over seeds; DHO minus the arm, paired, [95 %], p of a t-test."""
    names = list(next(iter(results.values()))[0])
    lines = ["| arm | " + " | ".join(f"{s} labels a class | DHO minus it" for s in results) + " |"]
    lines.append("| --- |" + " --- | --- |" * len(results))
    for name in names:
        cells = []
        for rows in results.values():
            gaps = [100 * (row["DHO"] - row[name]) for row in rows]
            cells += [_spread([100 * row[name] for row in rows]), "" if name == "DHO" else _paired(gaps)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def _paired(gaps: list[float]) -> str:
    if len(gaps) < 2:
        return f"{gaps[0]:+.1f}"
    test = stats.ttest_1samp(gaps, 0)
    low, high = test.confidence_interval(0.95)
    chance = "< 0.001" if test.pvalue < 0.001 else f"{test.pvalue:.3f}"
    return f"{statistics.mean(gaps):+.1f} [{low:.1f}, {high:.1f}], p {chance}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--out", type=Path, default=Path("runs/dho-demo"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the recipe, KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[int, list[dict[str, float]]] = {}
    for shots in args.shots:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            row = of_seed(args.out / f"shots-{shots}" / f"seed-{seed}", shots, seed, args.overrides)
            results.setdefault(shots, []).append(row)
    text = table(results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(text + "\n", "utf-8")
    (args.out / "results.json").write_text(json.dumps(results, indent=2), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
