"""The paper's analysis of finished comparisons, or of a table of pairs: ``python -m kd_plugin_kd_fidelity WHERE ...``.

WHERE is a folder that ``kd compare`` left (an arm for each method, named NAME-T2.0 where it has a temperature), or
a CSV file with the columns of ``Pair``; ``published`` is the authors' own table of results on mathematics.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from kd_plugin_kd_fidelity.hypotheses import Pairs, analyse, best_temperatures, grouped, table
from kd_plugin_kd_fidelity.pairs import Pair, pairs_of, read_csv

PUBLISHED = Path(__file__).with_name("published.csv")
COLUMNS = ("accuracy", "agreement", "fidelity", "calibration_error")


def read(where: Iterable[str]) -> list[Pair]:
    found: list[Pair] = []
    for name in where:
        path = PUBLISHED if name == "published" else Path(name)
        found += read_csv(path) if path.suffix == ".csv" else list(pairs_of(path))
    return found


def summary(pairs: Pairs) -> str:
    """A Markdown table: each student's mean over teachers, methods and seeds, alone -> distilled, and its mean I."""
    lines = [f"| student's size | {' | '.join(c.replace('_', ' ') for c in COLUMNS)} | I |", "|---" * 6 + "|"]
    for size, rows in sorted(grouped(pairs, lambda r: r.size).items(), key=lambda item: item[1][0].size):
        cells = [
            f"{fmean(getattr(r, f'sft_{c}') for r in rows):.3f} -> {fmean(getattr(r, c) for r in rows):.3f}"
            for c in COLUMNS
        ]
        gain = fmean(r.improvement for r in rows)
        lines.append(f"| {size:g} | {' | '.join(cells)} | {gain:+.3f} |")
    return "\n".join(lines)


def report(pairs: Pairs, variant: str, likeness_of: str | None = None) -> str:
    """Summary and tests of every task, as Markdown."""
    parts = []
    for task, rows in grouped(pairs, lambda r: r.task).items():
        runs = best_temperatures(rows, variant=variant)  # type: ignore[arg-type]
        found = analyse(rows, variant=variant, likeness_of=likeness_of)  # type: ignore[arg-type]
        parts.append(
            f"Task {task}, {len(runs)} runs, variant {variant}\n\n{summary(runs)}\n\n{table(found)}\n"
        )
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("where", nargs="+")
    parser.add_argument("--variant", choices=("paper", "released"), default="paper")
    parser.add_argument("--likeness-of", help="released: the method whose agreement stands for all")
    options = parser.parse_args(arguments)
    print(report(read(options.where), options.variant, options.likeness_of))


if __name__ == "__main__":
    main()
