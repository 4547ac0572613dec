"""The demonstration: DDK's mixture against the corpus, equal shares and its ablations. ``python -m kd_plugin_ddk.demo``.

Three tables: perplexity on a test split with as much of each domain, the worst domain's l_S / l_T on it, and how
far the shares move from one interval to the next (L1, mean over intervals). An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdcore
from kd_plugin_ddk.mixture import discrepancy
from kd_plugin_ddk.text import DOMAINS
from kdcore.checkpoint import load_tensors
from kdcore.comparison.record import record
from kdcore.models import build_module
from kdcore.shipping import load_student

CORPUS = "augmentation.0.mixture=natural"
ARMS = {
    "none": CORPUS,
    "kd": f"{CORPUS},loss.0.temperature=1.0",
    "natural": CORPUS,
    "equal": "augmentation.0.mixture=equal",
    "direct": "augmentation.0.mixture=direct",
    "labels": "loss.0.weight=0.0",
}
OWN = "ddk-text"


@torch.no_grad()
def perplexities(model: Any, loader: Any) -> Tensor:
    """float64 [N]: exp of the mean cross-entropy a token of each domain, of a module from tokens to logits."""
    total, count = (
        torch.zeros(len(DOMAINS), dtype=torch.float64),
        torch.zeros(len(DOMAINS), dtype=torch.float64),
    )
    for batch in loader:
        loss = F.cross_entropy(model(batch["input"]).transpose(1, 2), batch["target"], reduction="none")
        total.index_add_(0, batch["domain"], loss.double().sum(1))
        count.index_add_(0, batch["domain"], torch.full((len(loss),), loss.shape[1], dtype=torch.float64))
    return (total / count).exp()


def lag(folder: Path) -> Tensor:
    """l_S / l_T of each domain on the test split, [N], of a finished run."""
    student, run = load_student(folder)
    table = run.recipe.teacher["main"].params
    teacher = build_module(table["model"], table["args"])
    weights = load_tensors(run.folder / "teacher-main" / "teacher.safetensors", str(folder))
    teacher.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    said = [perplexities(model.eval(), run.source.loader("test")) for model in (student.model, teacher)]
    return discrepancy(*said)


def jump(folder: Path) -> float:
    """Mean L1 distance of the shares of neighbouring intervals, from the first that was measured on."""
    lines = (folder / "stages/distill/student/metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "ddk_r0" in row]
    shares = torch.tensor([[row[f"ddk_r{i}"] for i in range(len(DOMAINS))] for row in rows[1:]])
    return float(torch.stack([(b - a).abs().sum() for a, b in pairwise(shares)]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/ddk-demo"))
    args = parser.parse_args()
    specs = [f"{name}:{overrides}" for name, overrides in ARMS.items()]
    found = kdcore.compare(
        "ddk:text", specs, seeds=args.seeds, jobs=args.jobs, out=args.out / "compare", quiet=False
    )
    seeds = range(args.seeds)
    folders = {arm: [found.folder / "runs" / arm / f"seed-{s}" for s in seeds] for arm in (*ARMS, OWN)}
    lags = {arm: torch.stack([lag(folder) for folder in each]) for arm, each in folders.items()}
    worst = {arm: each.max(1).values.tolist() for arm, each in lags.items()}
    jumps = {arm: [jump(folder) for folder in folders[arm]] for arm in ("direct", OWN)}
    overall = {row["arm"]: row["values"] for row in found.table}
    references = ["natural", "equal", "direct"]
    print(record(args.out / "perplexity", "perplexity", seeds, overall, references), end="\n\n")
    print(record(args.out / "worst", "worst_perplexity_ratio", seeds, worst, references), end="\n\n")
    print(record(args.out / "jump", "mixture_distance", seeds, jumps, ["direct"]), end="\n\n")
    for arm, each in lags.items():
        print(arm, {name: round(float(value), 2) for name, value in zip(DOMAINS, each.mean(0), strict=True)})


if __name__ == "__main__":
    main()
