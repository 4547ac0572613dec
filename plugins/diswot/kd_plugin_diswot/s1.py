"""The authors' own space and accuracies: 64 residual nets on CIFAR-100, scored here. ``python -m kd_plugin_diswot.s1``.

CIFAR-100 does not ship with a library, so the batch is of natural images without classes: 32 x 32 pieces of
scikit-learn's two photographs, with labels drawn at random. A seed is a batch and initial weights of all nets.
First table: Kendall's tau-b with accuracy after distillation. Second: the share of the pairs of nearly equal size
(parameters within 15 %) that a score orders right.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from kd_plugin_diswot.demo import METHOD, SCORES, tau
from kd_plugin_diswot.looks import Look, distances, gaussian_, look
from kd_plugin_diswot.metrics import Variant
from kd_plugin_diswot.models import Net, stage_net
from kd_plugin_diswot.space import Score, fitness
from kdcore.comparison.record import record

STAGE = (1, 3, 5, 7)
DEPTHS = [(a, b, c) for a in STAGE for b in STAGE for c in STAGE]
# CIFAR-100 test accuracy after distillation, per cent, in the order of DEPTHS. Measured by the authors:
# lilujunai/DisWOT-CVPR2023 (Apache-2.0), exps/s1-gt-kd.txt at dffe4e6.
ACCURACY = """
    61.87 69.01 71.50 72.36 65.95 70.85 72.77 73.31 68.05 71.91 72.88 74.11 69.22 72.18 73.56 74.12
    63.49 70.01 72.27 73.18 66.64 70.76 72.89 73.79 68.71 71.84 73.26 74.44 70.24 72.63 73.56 74.42
    64.61 70.45 72.42 73.16 66.97 71.25 73.18 73.47 69.10 72.73 73.94 74.86 70.56 72.86 73.37 74.53
    65.39 71.01 72.02 73.69 67.44 71.63 73.36 73.97 69.67 72.58 73.34 74.23 70.85 72.70 73.92 74.44
"""
SCORED = {name: key for name, key in SCORES.items() if key != "flops"}


def accuracies() -> list[float]:
    return [float(value) for value in ACCURACY.split()]


def pieces(count: int, rng: np.random.Generator) -> Tensor:
    """[count, 3, 32, 32] of scikit-learn's photographs, each channel of mean 0 and deviation 1."""
    from sklearn.datasets import load_sample_images

    photos, found = load_sample_images().images, []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(size - 32) for size in photo.shape[:2])
        found.append(photo[top : top + 32, left : left + 32])
    images = torch.tensor(np.stack(found), dtype=torch.float32).permute(0, 3, 1, 2)
    mean, deviation = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    return (images - mean) / deviation


def seen(depths: tuple[int, int, int], seed: int, images: Tensor, target: Tensor) -> tuple[Look, Net]:
    torch.manual_seed(seed)
    net = stage_net(depths=depths)
    gaussian_(net)
    return look(lambda: net(images), net, target, feature="body", head="head"), net


def scores(seed: int, batch: int = 32) -> dict[str, list[float]]:
    """Every score of the 64 nets, by its key in ``SCORES``; higher is better."""
    rng = np.random.default_rng(seed)
    images, target = pieces(batch, rng), torch.tensor(rng.integers(100, size=batch))
    teacher, _ = seen((9, 9, 9), 1000 + seed, images, target)
    looks: list[Look] = []
    found: dict[str, list[float]] = {}
    for depths in DEPTHS:
        mine, net = seen(depths, seed, images, target)
        looks.append(mine)
        found.setdefault("parameters", []).append(float(sum(p.numel() for p in net.parameters())))
    for variant in get_args(Variant):
        M_r, M_s = zip(*(distances(mine, teacher, variant) for mine in looks), strict=True)
        for how in get_args(Score):
            found[f"{variant} {how}"] = fitness(M_r, M_s, how)
    return found


def concordance(score: Sequence[float], size: Sequence[float], accuracy: Sequence[float]) -> float:
    """The share of the pairs with sizes within 15 % of the larger that the score orders as the accuracy does."""
    pairs = itertools.combinations(range(len(size)), 2)
    near = [(i, j) for i, j in pairs if abs(size[i] - size[j]) < 0.15 * max(size[i], size[j])]
    right = [(score[i] - score[j]) * (accuracy[i] - accuracy[j]) > 0 for i, j in near]
    return float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/diswot-s1"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, accuracy = range(args.seeds), accuracies()
    orders: dict[str, list[float]] = {name: [] for name in SCORED}
    pairs: dict[str, list[float]] = {name: [] for name in SCORED}
    for seed in seeds:
        found = scores(seed)
        for name, key in SCORED.items():
            orders[name].append(tau(found[key], accuracy))
            pairs[name].append(concordance(found[key], found["parameters"], accuracy))
    for title, metric, values, chance in (
        ("order", "kendall_tau", orders, 0.0),
        ("pairs", "concordance", pairs, 0.5),
    ):
        table = {**values, "random order": [chance] * args.seeds}
        print(f"{title}\n\n{record(args.out / title, metric, seeds, table, [METHOD])}\n")


if __name__ == "__main__":
    main()
