"""Matched pairs: one distilled student beside the same student trained on the labels alone."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kdcore import InputError


@dataclass(frozen=True)
class Pair:
    """A run r = (teacher, student, method) on one task, with its student alone (SFT). Shares and accuracies are
    in one unit throughout. ``size`` is the student's, in parameters; ``choice`` is the accuracy on held-out data
    that temperatures are chosen by; NaN where a value was not measured.
    """

    teacher: str
    student: str
    method: str
    size: float
    teacher_accuracy: float
    sft_accuracy: float
    accuracy: float
    task: str = "all"
    seed: int = 0
    temperature: float = 1.0
    choice: float = float("nan")
    agreement: float = float("nan")
    sft_agreement: float = float("nan")
    fidelity: float = float("nan")
    sft_fidelity: float = float("nan")
    calibration_error: float = float("nan")
    sft_calibration_error: float = float("nan")

    @property
    def improvement(self) -> float:
        """I: what distillation added to the accuracy."""
        return self.accuracy - self.sft_accuracy


def read_csv(path: Path) -> list[Pair]:
    """Pairs from a table with Pair's fields as columns; a column or cell that is absent keeps its default."""
    numbers = {f.name for f in fields(Pair) if f.type == "float"}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    read = {**dict.fromkeys(numbers, float), "seed": int}
    return [Pair(**{k: read.get(k, str)(v) for k, v in row.items()}) for row in rows]


def pairs_of(folder: Path, probe: Mapping[str, Any] | None = None) -> Iterator[Pair]:
    """Every distilled run of a comparison (``kd compare``), beside its arm ``none`` of the same seed.

    The models are measured by the probe ``kd-fidelity`` with the parameters ``probe``, which writes what it found
    beside each run, so the models are asked once. An arm ``NAME-T2.0`` is the method NAME at temperature 2, any
    other a method at 1. Raises InputError where the folder is no comparison with an arm ``none``.
    """
    plan = folder / "plan.json"
    arms: dict[str, Any] = json.loads(plan.read_text("utf-8"))["arms"] if plan.exists() else {}
    if "none" not in arms:
        raise InputError(str(folder), "no comparison with an arm none", hint="kd compare makes one")
    for arm in (name for name in arms if name != "none"):
        for path in sorted(folder.glob(f"runs/{arm}/seed-*")):
            alone = measured(folder / "runs" / "none" / path.name, probe)
            found, seed = measured(path, probe), int(path.name.rpartition("-")[2])
            for teacher in found["teachers"]:
                yield _pair(arm, seed, teacher, found, alone)


def measured(run: Path, probe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the probe says of a finished run's models; kept in the run's folder as kd-fidelity.json."""
    kept, asked = run / "kd-fidelity.json", dict(probe or {})
    before = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    if before.get("probe") != asked:
        from kdcore import shipping
        from kdcore.recipe import parse

        recipe, _ = shipping.load_run(run)
        tree = {**recipe.model_dump(exclude_unset=True), "probe": [{"use": "kd-fidelity", **asked}]}
        before = {"probe": asked, **shipping.measure_probes(parse(tree), run)["kd-fidelity"]}
        kept.write_text(json.dumps(before, indent=1), "utf-8")
    return dict(before)


def _pair(arm: str, seed: int, teacher: str, found: Mapping[str, Any], alone: Mapping[str, Any]) -> Pair:
    named = re.fullmatch(r"(.+)-T([\d.]+)", arm)
    method, temperature = named.groups() if named else (arm, "1")
    theirs = found["teachers"][teacher]
    mine, sft = (each["student"] for each in (found, alone))
    return Pair(
        teacher=f"{theirs['parameters']}",
        student=f"{mine['parameters']}",
        method=method,
        size=mine["parameters"],
        teacher_accuracy=theirs["accuracy"],
        sft_accuracy=sft["accuracy"],
        accuracy=mine["accuracy"],
        seed=seed,
        temperature=float(temperature),
        choice=mine["choice"],
        agreement=mine[f"agreement_{teacher}"],
        sft_agreement=sft[f"agreement_{teacher}"],
        fidelity=mine[f"fidelity_{teacher}"],
        sft_fidelity=sft[f"fidelity_{teacher}"],
        calibration_error=mine["calibration_error"],
        sft_calibration_error=sft["calibration_error"],
    )
