"""The theory: where cross-entropy and BinaryKL pull one network two ways. ``python -m kd_plugin_dhkd.demo``.

Fifty Gaussian classes in 32 dimensions, a student with 32 hidden units and one head, SGD as the authors'. At
every step: the cosine of the two losses' gradients at the head's weight and at the feature below it. A step
with a cosine below 0 is in conflict.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdcore
from kd_plugin_dhkd.loss import binary_kl

CLASSES, WIDTH, BATCH, NOISE = 50, 32, 64, 0.8
Cosines = dict[str, list[float]]


def clusters(seed: int, count: int = 4000) -> tuple[Tensor, Tensor]:
    """``count`` points [count, 32] of 50 unit Gaussians around centres of the same spread, and their classes."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=rng)
    y = torch.randint(CLASSES, (count,), generator=rng)
    return centres[y] + NOISE * torch.randn(count, WIDTH, generator=rng), y


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def trained_teacher(x: Tensor, y: Tensor, epochs: int = 10) -> nn.Module:
    teacher = network(256)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for index in batches(len(x), epochs):
        optimizer.zero_grad()
        F.cross_entropy(teacher(x[index]), y[index]).backward()
        optimizer.step()
    return teacher.eval()


def batches(count: int, epochs: int) -> list[Tensor]:
    return [index for _ in range(epochs) for index in torch.randperm(count).split(BATCH)]


def cosines(seed: int, epochs: int, lr: float = 0.05) -> Cosines:
    """The cosine at ``head`` and at ``feature`` for every step of CE + BinaryKL on one head."""
    torch.manual_seed(seed)
    x, y = clusters(seed)
    teacher, student = trained_teacher(x, y), network(32)
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    head, found = student[-1], Cosines(head=[], feature=[])
    for index in batches(len(x), epochs):
        feature = student[:-1](x[index])
        with torch.no_grad():
            t = teacher(x[index])
        z = head(feature)
        terms = (F.cross_entropy(z, y[index]), binary_kl(z, t).mean())
        places = {"head": head.weight, "feature": feature}
        for name, place in places.items():
            one, two = (torch.autograd.grad(term, [place], retain_graph=True)[0].flatten() for term in terms)
            found[name].append(F.cosine_similarity(one, two, dim=0).item())
        optimizer.zero_grad()
        torch.stack(terms).sum().backward()
        optimizer.step()
    return found


def share_in_conflict(values: list[float]) -> float:
    return sum(value < 0 for value in values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/dhkd-demo"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(args.seeds))
    found = [cosines(seed, args.epochs) for seed in seeds]
    values = {place: [share_in_conflict(each[place]) for each in found] for place in ("head", "feature")}
    for place, shares in values.items():
        mean = statistics.fmean(statistics.fmean(each[place]) for each in found)
        print(f"{place}: mean cosine {mean:.3f}; steps in conflict {[f'{s:.1%}' for s in shares]}")
    versions = {"kdcore": kdcore.__version__, "torch": torch.__version__}
    report = {"metric": "steps_in_conflict", "seeds": seeds, "values": values, "references": ["feature"]}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compare.json").write_text(json.dumps({**report, "versions": versions}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
