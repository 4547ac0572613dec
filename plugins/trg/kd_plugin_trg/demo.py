"""The demonstration: does the student's token graph become the teacher's? ``python -m kd_plugin_trg.demo --seeds 5``.

Matched arms by ``kd compare``, judged by accuracy on balanced test images; then, of the same trained students, the
probe's neighbour overlap, context correlation and recall of the rarest classes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kdcore
from kdcore import shipping
from kdcore.comparison.record import record
from kdcore.recipe import parse

RECIPE = "trg:digits"
ARMS = (
    "kdT2:loss.0.weight=0.0,loss.1.temperature=2.0",
    "trg10:loss.0.weight=10.0",
    "inner10:loss.0.weight=10.0,loss.0.beta=0.0,loss.0.gamma=0.0",
    "graph10:loss.0.weight=10.0,loss.0.alpha=0.0",
)
MEASURES = ("neighbour_overlap", "context_correlation", "tail_recall")


def measured(folder: Path) -> dict[str, Any]:
    """What the probe says of a finished run; kept beside it."""
    kept = folder / "trg.json"
    if not kept.exists():
        recipe, _ = shipping.load_run(folder)
        path = {"student_path": "body.0.1", "teacher_path": "body.0.1"}
        tree = {**recipe.model_dump(exclude_unset=True), "probe": [{"use": "trg", **path}]}
        kept.write_text(json.dumps(shipping.measure_probes(parse(tree), folder)["trg"]), "utf-8")
    found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/trg"))
    options = parser.parse_args(arguments)
    compared = kdcore.compare(RECIPE, ARMS, seeds=options.seeds, out=options.out / "accuracy")
    print(compared.markdown)
    arms, seeds = [row["arm"] for row in compared.table], range(options.seeds)
    found = {arm: [measured(compared.folder / f"runs/{arm}/seed-{s}") for s in seeds] for arm in arms}
    for name in MEASURES:
        values = {arm: [row[name] for row in rows] for arm, rows in found.items()}
        print(record(options.out / name, name, seeds, values, ["kd"]), "\n")


if __name__ == "__main__":
    main()
