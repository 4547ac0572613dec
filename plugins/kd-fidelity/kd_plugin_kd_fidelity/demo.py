"""The demonstration: the paper's analysis on 8 pairs of models. ``python -m kd_plugin_kd_fidelity.demo --seeds 5``.

Two teachers, four students, three methods at two temperatures, and the same students on labels alone, all
matched by ``kd compare``; then the analysis in both variants, and a sweep of noise on the teacher's logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import kdcore
from kd_plugin_kd_fidelity.__main__ import report
from kd_plugin_kd_fidelity.hypotheses import best_temperatures
from kd_plugin_kd_fidelity.pairs import Pair, pairs_of
from kdcore import recipe as recipes
from kdcore.comparison.record import record

RECIPE = "kd-fidelity:digits"
TEACHERS, STUDENTS = (32, 256), (4, 8, 16, 64)
METHODS, TEMPERATURES = ("forward", "reverse", "js"), (1.0, 4.0)
OWN, STOCK = "forward-T1.0", "forward-T4.0"  # the recipe's own arm, and what the stock arm kd is here
NOISES = (1.0, 2.0, 4.0, 8.0)
SWEPT = (256, 8)  # the pair whose teacher gets noise


def tree_of(teacher: int, student: int) -> dict[str, Any]:
    """The recipe with models of these widths, its own loss forward KL at T = 1."""
    tree = dict(recipes.read(RECIPE).tree)
    tree["name"] = OWN
    tree["teacher"]["main"]["args"]["hidden"] = [teacher]
    tree["student"]["args"]["hidden"] = [student]
    tree["loss"] = [{"use": "kd-fidelity", "kind": "forward", "temperature": 1.0}]
    return tree


def arms_of(teacher: int, student: int) -> list[str]:
    names = [(m, t) for m in METHODS for t in TEMPERATURES if f"{m}-T{t}" not in (OWN, STOCK)]
    arms = [f'{m}-T{t}:loss.0.kind="{m}",loss.0.temperature={t}' for m, t in names]
    return arms + [f"noise{n:g}:loss.0.noise={n}" for n in NOISES if (teacher, student) == SWEPT]


def compared(teacher: int, student: int, seeds: int, out: Path) -> list[Pair]:
    """The pair's runs, trained or read, and measured."""
    folder = out / f"teacher-{teacher}-student-{student}"
    kdcore.compare(tree_of(teacher, student), arms_of(teacher, student), seeds=seeds, out=folder)
    return [
        replace(r, method="forward", temperature=4.0) if r.method == "kd" else r for r in pairs_of(folder)
    ]


def recorded(pairs: Sequence[Pair], seeds: int, out: Path) -> str:
    """Each method's mean accuracy over the pairs, seed by seed, beside the students alone; as compare.json too."""
    runs = best_temperatures(pairs)
    values = {
        method: [fmean(r.accuracy for r in runs if (r.method, r.seed) == (method, s)) for s in range(seeds)]
        for method in METHODS
    }
    alone = [fmean(r.sft_accuracy for r in runs if r.seed == s) for s in range(seeds)]
    return record(out / "methods", "accuracy", range(seeds), {"none": alone, **values}, ["none"])


def noise_table(pairs: Sequence[Pair]) -> str:
    """A Markdown table of the sweep: forward KL at T = 1, noise of growing standard deviation on z_T."""
    arms = {0.0: [r for r in pairs if (r.method, r.temperature) == ("forward", 1.0)]}
    arms |= {n: [r for r in pairs if r.method == f"noise{n:g}"] for n in NOISES}
    lines = ["| noise | I | agreement | fidelity |", "|---|---|---|---|"]
    for noise, rows in arms.items():
        cells = [
            f"{fmean(v):.3f} ± {stdev(v):.3f}"
            for v in ([getattr(r, c) for r in rows] for c in ("improvement", "agreement", "fidelity"))
        ]
        lines.append(f"| {noise:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/kd-fidelity"))
    parser.add_argument("--teachers", type=int, nargs="+", default=TEACHERS)
    parser.add_argument("--students", type=int, nargs="+", default=STUDENTS)
    options = parser.parse_args(arguments)
    found = {
        (t, s): compared(t, s, options.seeds, options.out) for t in options.teachers for s in options.students
    }
    pairs = [r for rows in found.values() for r in rows if r.method in METHODS]
    for variant in ("paper", "released"):
        print(report(pairs, variant, "forward"))
    print(recorded(pairs, options.seeds, options.out), "\n")
    if SWEPT in found:
        print(noise_table(found[SWEPT]))


if __name__ == "__main__":
    main()
