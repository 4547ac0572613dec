"""What the students of a comparison do on disturbed test images. ``python -m kd_plugin_mix_kd.demo FOLDER``.

FOLDER is what ``kd compare mix-kd --out FOLDER`` left. For every run: test accuracy with Gaussian noise (sd
0.25), and after one step of the sign of the gradient (FGSM, 0.1). The attack goes through the raw logits: on students
that were trained without rescaling, one through the rescaled logits is much weaker.
Writes FOLDER/noise/compare.json and FOLDER/fgsm/compare.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdcore
from kdcore import Batch, Student
from kdcore.shipping import load_student

Disturb = Callable[[Student, Tensor, Tensor], Tensor]


def predict(student: Student, images: Tensor) -> Tensor:
    """The inference rule's logits [B, C] of images [B, ...]."""
    return student.infer(student(Batch({"input": images})))["logits"]


def noise(student: Student, images: Tensor, target: Tensor, sd: float = 0.25) -> Tensor:
    """The same noise for every student."""
    return images + sd * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def fgsm(student: Student, images: Tensor, target: Tensor, size: float = 0.1) -> Tensor:
    """One step of ``size`` along the sign of the gradient of cross-entropy on the raw logits."""
    at = images.clone().requires_grad_()
    raw = student(Batch({"input": at}))["logits"]
    (slope,) = torch.autograd.grad(F.cross_entropy(raw, target), [at])
    return images + size * slope.sign()


def accuracy(folder: Path, disturb: Disturb) -> float:
    """Of a run's student on its disturbed test split."""
    student, run = load_student(folder)
    student.eval()
    right, count = 0, 0
    for batch in run.source.loader("test"):
        images, target = batch["input"], batch["target"]
        disturbed = disturb(student, images, target)
        with torch.no_grad():
            found = predict(student, disturbed)
        right += int((found.argmax(1) == target).sum())
        count += len(target)
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text("utf-8"))
    arms, seeds = [row["arm"] for row in found["table"]], found["seeds"]
    versions = {"kdcore": kdcore.__version__, "torch": torch.__version__}
    for name, disturb in {"noise": noise, "fgsm": fgsm}.items():
        runs = {arm: [folder / "runs" / arm / f"seed-{seed}" for seed in seeds] for arm in arms}
        values = {arm: [accuracy(run, disturb) for run in row] for arm, row in runs.items()}
        report = {"metric": "accuracy", "seeds": seeds, "values": values, "references": ["none", "kd"]}
        report["versions"] = versions
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "compare.json").write_text(json.dumps(report, indent=1), "utf-8")
        for arm, row in values.items():
            print(f"{name} {arm}: {statistics.fmean(row):.2%} ± {statistics.stdev(row):.2%}")


if __name__ == "__main__":
    main()
