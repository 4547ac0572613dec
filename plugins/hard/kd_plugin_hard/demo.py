"""The demonstration: HARD beside plain KD and hand-made augmentations. ``python -m kd_plugin_hard.demo``.

Judged on shifted test digits by ``kd compare`` (one teacher for all arms, the same seeds and steps), and the same
students on centred ones. An interrupted demonstration goes on in its folder.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

import kdcore
from kd_plugin_hard.data import shifted_digits
from kdcore.comparison.record import record
from kdcore.report import read_metrics
from kdcore.shipping import load_student

RECIPE = "hard:digits"
OFF = "augmentation=[]"
SAME = "augmentation.0.steps=0,augmentation.0.views.0"  # the augmentor, never trained
MILD = "shift = 0.25, rotation = 30.0, scale = 0.3, shear = 0.2"
ARMS = (
    f"none:{OFF}",
    f"kd:{OFF},loss.0.temperature=2.0",
    f"kd-long:{OFF},train.epochs=120",  # HARD's steps cost about twice as much
    f"untrained:{SAME}.spread=0.1",
    f"random:{SAME}.spread=1.0",  # uniform over the same bounds
    f'random-mild:{SAME}={{ use = "hard.affine", spread = 1.0, {MILD} }}',
    'generator:augmentation.0.views=[{ use = "hard.generator" }]',
    f"shifts:{OFF},data.args.train_shift=3",  # knows the answer
)


def centred(folder: Path) -> float:
    """The accuracy of a run's student on centred test digits."""
    test = shifted_digits(test_shift=0).test.values
    student, _ = load_student(folder)
    with torch.no_grad():
        said = student.deploy()(test["input"])["logits"].argmax(1)
    return float((said == test["target"]).float().mean())


def reached(folder: Path) -> dict[str, float]:
    """How far the augmentor's distributions reached in the end (0.1 at first, 1 is uniform over the bounds)."""
    last = read_metrics(folder / "stages/distill/student/metrics.jsonl")[-2]  # the last row is an evaluation
    return {name: last[f"hard_{name}"] for name in ("right", "down", "rotation", "scale", "shear")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/hard-demo"))
    args = parser.parse_args()
    out, seeds = args.out, range(args.seeds)
    print(kdcore.compare(RECIPE, ARMS, seeds=args.seeds, jobs=args.jobs, out=out, quiet=False).markdown)
    arms = [path.name for path in sorted((out / "runs").iterdir())]
    values = {arm: [centred(out / "runs" / arm / f"seed-{seed}") for seed in seeds] for arm in arms}
    learned = [reached(out / "runs/hard-digits" / f"seed-{seed}") for seed in seeds]
    print({name: f"{statistics.fmean(row[name] for row in learned):.2f}" for name in learned[0]})
    print(record(out / "centred", "accuracy", seeds, values, ["none", "kd"]))


if __name__ == "__main__":
    main()
