"""The demonstration: SgVA-CLIP with and without guidance. ``python -m kd_plugin_sgva_clip.demo``.

Every seed draws its own split, captions, CLIP and initial adapter. Every arm finds its fusion weight on the same
``tune`` images; "plain KD, tuned" picks its loss weight there, too, where the guidance keeps the paper's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

import kdcore
from kd_plugin_sgva_clip.student import SgVA
from kdcore.comparison.record import record
from kdcore.shipping import load_student
from kdcore.task import Task

OWN, BARE = "SgVA-CLIP", "no guidance"
KD_WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)
ARMS: dict[str, list[str]] = {
    BARE: ["loss=[]"],
    **{f"kd {weight}": ["loss.0.use=kd", f"loss.0.weight={weight}"] for weight in KD_WEIGHTS},
    OWN: [],
    f"{OWN}, released variant": ["student.variant=released"],
}
READ_OFF = {"prompt alone": 0.0, f"{OWN}, prototypes alone": 1.0}  # the fusion weight of the same student
Row = dict[str, float]


def one(folder: Path, seed: int, arm: str, extra: list[str]) -> Row:
    """Train (or find trained) one arm; its accuracies on tune and test, and the fusion weight that it found."""
    overrides = [*ARMS[arm], f"data.args.split_seed={seed}", *extra]
    kdcore.run("sgva-clip:digits", out=folder, overrides=overrides, seed=seed, resume=True)
    student, run = load_student(folder)
    assert isinstance(student, SgVA)
    task = Task(run.recipe.task, run.source.data.classes)

    def accuracy(split: str) -> float:
        return run.evaluate(student, task, split)["accuracy"]

    row = {"weight": float(student.weight), "tune": accuracy("tune"), "test": accuracy("test")}
    for name, weight in READ_OFF.items():
        student.weight.fill_(weight)
        row[name] = accuracy("test")
    results = json.loads((folder / "results.json").read_text("utf-8"))
    return {**row, "zero-shot CLIP": results["test"]["main"]["accuracy"]}


def of_seed(folder: Path, seed: int, extra: list[str]) -> tuple[Row, float]:
    """Test accuracy of every arm for one seed, and SgVA-CLIP's fusion weight."""
    rows = {arm: one(folder / arm.replace(", ", "-").replace(" ", "-"), seed, arm, extra) for arm in ARMS}
    plain = {weight: rows[f"kd {weight}"] for weight in KD_WEIGHTS}
    tuned = max(plain, key=lambda weight: plain[weight]["tune"])
    found = {"zero-shot CLIP": rows[OWN]["zero-shot CLIP"], "prompt alone": rows[OWN]["prompt alone"]}
    found |= {BARE: rows[BARE]["test"], f"{BARE}, prototypes alone": rows[BARE][f"{OWN}, prototypes alone"]}
    found |= {"plain KD, weight 1": plain[1.0]["test"], "plain KD, tuned": plain[tuned]["test"]}
    found |= {OWN: rows[OWN]["test"], f"{OWN}, prototypes alone": rows[OWN][f"{OWN}, prototypes alone"]}
    released = f"{OWN}, released variant"
    return found | {released: rows[released]["test"]}, rows[OWN]["weight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sgva-clip-demo"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the recipe, KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows, weights = zip(
        *(of_seed(args.out / f"seed-{seed}", seed, args.overrides) for seed in seeds), strict=True
    )
    values = {arm: [row[arm] for row in rows] for arm in rows[0]}
    print(f"fusion weight {statistics.fmean(weights):.2f} ({min(weights):.2f} to {max(weights):.2f})\n")
    print(record(args.out, "accuracy", seeds, values, [OWN, f"{OWN}, prototypes alone"]))


if __name__ == "__main__":
    main()
