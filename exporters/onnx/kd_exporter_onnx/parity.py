"""The gates on numbers: the artefact, reloaded in a fresh process, against the student on every case."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kd_exporter_onnx import replay
from kd_exporter_onnx.artefact import Precision, Provider
from kd_exporter_onnx.cases import Case, Cases
from kd_exporter_onnx.compare import Difference, difference
from kd_exporter_onnx.errors import Refused
from kd_exporter_onnx.grid import Point
from kd_exporter_onnx.providers import misplaced
from kd_exporter_onnx.spec import Array, ExportSpec


class Compared(BaseModel):
    """One output at one point: largest difference as a share of `scale`, its largest magnitude there."""

    provider: Provider
    point: Point
    output: str
    difference: float
    scale: float


def gate_reload(folder: Path, cases: Cases, provider: Provider, work: Path) -> dict[str, dict[str, int]]:
    """Reload in a fresh process without torch: digests, session, every case. Returns where nodes ran."""
    job = replay.Job(
        folder=folder,
        provider=provider,
        graph=[case.path for case in cases.graph],
        raw=cases.raw,
        status=work / "status.json",
    )
    status = _fresh_process(job, work)
    if status.step == "open":
        raise Refused("loads", f"onnxruntime cannot load it on {provider}: {status.error}")
    if status.step is not None:
        point = next((case.point for case in cases.graph if case.path.name == status.step), None)
        raise Refused("runs", f"onnxruntime on {provider} fails on real samples: {status.error}", point=point)
    gate_provider(status.placement, provider)
    return status.placement


def _fresh_process(job: replay.Job, work: Path) -> replay.Status:
    (work / "job.json").write_text(job.model_dump_json())
    job.status.unlink(missing_ok=True)
    command = [sys.executable, "-m", "kd_exporter_onnx.replay", str(work / "job.json")]
    ended = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    if not job.status.is_file():
        raise Refused("loads", f"the process that reloaded the artefact died: {ended.stderr.strip()[-500:]}")
    return replay.Status.model_validate_json(job.status.read_text())


def child_environment() -> dict[str, str]:
    """This process' environment, with this package found wherever it was imported from."""
    roots = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}


def gate_provider(placement: Mapping[str, Mapping[str, int]], provider: Provider) -> None:
    """The work really ran on `provider`: onnxruntime moves what it cannot place to the CPU without a word."""
    if wrong := misplaced(placement, provider):
        raise Refused("provider", f"{provider} was asked for, but these operators ran on the CPU: {wrong}")


def gate_parity(
    spec: ExportSpec, cases: Cases, allowed: float, precision: Precision, provider: Provider
) -> list[Compared]:
    """Every output of every case within `allowed` of the student's, relative to the output's own scale.

    int8: shape, dtype and finiteness are judged here, the values by the metric.
    """
    compared = []
    for case in cases.graph:
        actual = case.actual()
        for name, expected in case.expected.items():
            found = difference(expected, actual[name], _keep(spec, name, case.feeds))
            if found.problem or (precision != "int8" and not found.within(allowed)):
                raise _refusal(spec, case, name, actual[name], found, allowed)
            one = Compared(
                provider=provider, point=case.point, output=name, difference=found.relative, scale=found.scale
            )
            compared.append(one)
    return compared


def _keep(spec: ExportSpec, output: str, feeds: Mapping[str, Array]) -> Array | None:
    mask = spec.compare_where.get(output)
    return None if mask is None else feeds[mask] != 0


def _refusal(
    spec: ExportSpec, case: Case, name: str, actual: Array, found: Difference, allowed: float
) -> Refused:
    expected = case.expected[name]
    reason = found.problem or "not the student's values; the difference is a share of the output's scale"
    by_row = found.row is not None and expected.shape[:1] == case.rows.shape
    return Refused(
        "parity",
        reason + _mask_hint(case, name, actual, allowed),
        output=name,
        sample=int(case.rows[found.row]) if by_row else None,
        point=case.point,
        distance=None if found.problem else found.relative,
        allowed=allowed,
    )


def _mask_hint(case: Case, name: str, actual: Array, allowed: float) -> str:
    """Rows that a mask hides entirely get other values in torch's fused attention than in any ONNX graph."""
    expected = case.expected[name]
    for mask, value in case.feeds.items():
        covers = value.ndim < expected.ndim and value.shape == expected.shape[: value.ndim] and value.ndim > 1
        is_mask = covers and value.min() == 0 and value.max() <= 1
        if is_mask and difference(expected, actual, value != 0).within(allowed):
            return (
                f"; only where {mask!r} is 0: if these positions mean nothing, say so with "
                f"compare_where={{{name!r}: {mask!r}}}"
            )
    return ""


def gate_rule(spec: ExportSpec, cases: Cases, allowed: float) -> dict[str, Any]:
    """The student's inference rule is in the graph: the outputs are the rule's, not those without it."""
    if spec.rule is None:
        return {"declared": False}
    served = cases.gather([case.actual() for case in cases.samples])
    for name, expected in spec.rule.items():
        found = difference(expected, served[name].astype(expected.dtype), _keep(spec, name, spec.samples))
        if not found.within(allowed):
            reason = found.problem or "the graph does not follow the student's inference rule"
            raise Refused(
                "rule", reason, output=name, sample=found.row, distance=found.relative, allowed=allowed
            )
    for title, outputs in spec.rule_alternatives.items():
        if all(difference(value, spec.rule[name]).within(10 * allowed) for name, value in outputs.items()):
            raise Refused(
                "rule", f"nothing is proved: without the rule ({title}) these samples give the same"
            )
    return {"declared": True, "outputs": sorted(spec.rule), "told_apart_from": sorted(spec.rule_alternatives)}
