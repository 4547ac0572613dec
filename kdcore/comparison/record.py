"""The table of a demonstration whose arms are not overrides of one recipe, in the form of ``kd compare``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdcore import __version__
from kdcore.checkpoint import write_json
from kdcore.comparison.stats import Values, compare_all
from kdcore.comparison.verdicts import scale_of
from kdcore.errors import InputError

HOW = "Mean ± standard deviation on test; paired t-tests over seeds, p after Holm over a table's differences."


def record(folder: Path, metric: str, seeds: Sequence[int], values: Values, references: Sequence[str]) -> str:
    """Write ``folder``/compare.json, which tools/evidence.py reads, and give the table as markdown.

    ``values`` hold one number for each of ``seeds`` and arm; every arm is compared with every reference. Raises
    InputError, and writes nothing, where a value is missing or not finite, or a reference is none of the arms.
    """
    import torch

    for arm, row in values.items():
        if not seeds or len(row) != len(seeds) or not all(map(math.isfinite, row)):
            raise InputError(
                arm, f"one finite value for each of the seeds {list(seeds)} is needed", given=row
            )
    for name in references:
        if name not in values:
            raise InputError("references", "no such arm", given=name, allowed=values)
    data = {"metric": metric, "seeds": list(seeds), "values": dict(values), "references": list(references)}
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"kdcore": __version__, "torch": torch.__version__}
    write_json(folder / "compare.json", {**data, "versions": versions})
    return table(metric, seeds, values, references)


def table(metric: str, seeds: Sequence[int], values: Values, references: Sequence[str]) -> str:
    """Markdown: an arm a line, differences to each reference with 95 % interval and corrected p (from two seeds on)."""
    paired = len(seeds) > 1
    differences = compare_all(values, references) if paired else {}
    scale = scale_of(metric, None, values)
    row_of_all = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    which = f"{seeds[0]} to {seeds[-1]}" if row_of_all else ", ".join(map(str, seeds))
    head = ["arm", f"{metric.replace('_', ' ')}{scale.unit}, seeds {which}"]
    head += [f"to {reference} [95 %], p" for reference in references]
    rows = [head, ["---"] * len(head)]
    for arm, row in values.items():
        spread = f" ± {scale.number(float(np.std(row, ddof=1)))}" if paired else ""
        cells = [scale.difference(differences.get((arm, reference))) for reference in references]
        rows.append([arm, scale.number(float(np.mean(row))) + spread, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
