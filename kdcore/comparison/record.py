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

    ``values`` hold one number for each of ``seeds`` and arm; every arm is compared with every reference. Raises
    ValueError, and writes nothing, where a value or a reference is missing.
    """
    import torch

    if bad := [arm for arm, row in values.items() if len(row) != len(seeds)] if seeds else ["no seeds"]:
        raise ValueError(f"{bad[0]}: one value for each of the seeds {list(seeds)} is needed")
    if unknown := [each for each in references if each not in values]:
        raise ValueError(f"the reference {unknown[0]} is none of the arms {list(values)}")
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
    row_of_all = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    which = f"{seeds[0]} to {seeds[-1]}" if row_of_all else ", ".join(map(str, seeds))
    head = [f"{metric.replace('_', ' ')}{scale.unit}, seeds {which}"]
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
