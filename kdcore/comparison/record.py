"""The table of a demonstration whose arms are not overrides of one recipe, in the form of ``kd compare``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcore import __version__
from kdcore.checkpoint import write_json
from kdcore.comparison.stats import compare_all
from kdcore.comparison.verdicts import p_value, scale_of

HOW = "Mean ± standard deviation on test; paired t-tests over seeds, p after Holm over a table's differences."


def record(
    folder: Path,
    metric: str,
    seeds: Sequence[int],
    values: Mapping[str, Sequence[float]],
    references: Sequence[str],
) -> str:
    """Write ``folder``/compare.json, which tools/evidence.py reads, and give the table as markdown.

    ``values`` hold one number for each of ``seeds`` and arm; every arm is compared with every reference.
    """
    import torch

    versions: dict[str, Any] = {"kdcore": __version__, "torch": torch.__version__}
    data = {"metric": metric, "seeds": list(seeds), "values": dict(values), "references": list(references)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", {**data, "versions": versions})
    return table(metric, seeds, values, references)


def table(
    metric: str,
    seeds: Sequence[int],
    values: Mapping[str, Sequence[float]],
    references: Sequence[str],
) -> str:
    """Markdown: an arm a line, differences to each reference with 95 % interval and corrected p (from two seeds on)."""
    paired = len(seeds) > 1
    differences = compare_all(values, references) if paired else {}
    scale = scale_of(metric, None, max((abs(row[0]) for row in values.values()), default=1.0))
    head = [f"{metric.replace('_', ' ')}{scale.unit}, seeds {seeds[0]} to {seeds[-1]}"]
    head += [f"to {reference} [95 %], p" for reference in references]
    lines = ["| arm | " + " | ".join(head) + " |", "| --- |" + " --- |" * len(head)]
    for arm, row in values.items():
        spread = f" ± {scale.number(statistics.stdev(row))}" if paired else ""
        cells = [scale.number(statistics.fmean(row)) + spread]
        for d in (differences.get((arm, reference)) for reference in references):
            cells.append(
                f"{scale.number(d.mean, '+')}{scale.interval(d)}, {p_value(d.corrected)}" if d else ""
            )
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
