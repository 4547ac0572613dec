"""The task's metric as a receiver gets it: raw samples through the shipped preprocessing and the artefact."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kd_exporter_onnx import replay
from kd_exporter_onnx.cases import Arrays, Cases
from kd_exporter_onnx.compare import Array, difference
from kd_exporter_onnx.errors import Refused
from kd_exporter_onnx.runtime import Host, load_host
from kd_exporter_onnx.spec import ExportSpec

_PREPARED = "prepared/"
# Preprocessing may be written in another order of operations than training's; values are then equal to this.
PREPARED_TOLERANCE = 1e-3


class MetricDrop(BaseModel):
    """reference: the training pipeline's; served: raw samples through the artefact; drop > 0 is worse."""

    name: str
    reference: float
    served: float
    drop: float
    allowed: float


def gate_metric(spec: ExportSpec, cases: Cases, max_drop: float) -> MetricDrop | None:
    """What is served is at most `max_drop` (in the metric's own unit) worse than in torch."""
    if spec.metric is None:
        return None
    wanted = spec.reference_metric
    if wanted is None:
        wanted = float(spec.metric(_student(spec, cases), spec.targets))
    served = float(spec.metric(_served(cases), spec.targets))
    drop = wanted - served if spec.higher_is_better else served - wanted
    found = MetricDrop(name=spec.metric_name, reference=wanted, served=served, drop=drop, allowed=max_drop)
    if not drop <= max_drop:  # a NaN is refused too
        reason = f"{spec.metric_name} is {served:.4g} as served and {wanted:.4g} in torch"
        raise Refused("metric", reason, distance=drop, allowed=max_drop)
    return found


def gate_preprocessing(spec: ExportSpec, cases: Cases, allowed: float) -> dict[str, Any]:
    """Raw samples prepared as shipped, against training's; without a metric the outputs are judged."""
    if not cases.raw:
        return {"declared": False}
    raw = cases.gather([replay.restore(replay.output_of(path)) for path in cases.raw])
    prepared = {tensor.name: raw[_PREPARED + tensor.name] for tensor in spec.inputs}
    apart = {name: difference(spec.samples[name], value) for name, value in prepared.items()}
    if spec.metric is None:
        student = _student(spec, cases)
        _judge(student, _served(cases), max(allowed, PREPARED_TOLERANCE))
    return {
        "declared": True,
        "inputs": {name: found.problem or found.relative for name, found in apart.items()},
    }


def _judge(student: Arrays, served: Arrays, allowed: float) -> None:
    for name, expected in student.items():
        pairs = zip(expected, served[name], strict=True) if isinstance(expected, list) else None
        for row, (one, two) in enumerate(pairs or [(expected, served[name])]):
            found = difference(one, two)
            if not found.within(allowed):
                reason = found.problem or "raw samples through the shipped preprocessing give other outputs"
                raise Refused(
                    "preprocessing",
                    reason,
                    output=name,
                    sample=row if pairs else found.row,
                    distance=found.relative,
                    allowed=allowed,
                )


def _student(spec: ExportSpec, cases: Cases) -> dict[str, Any]:
    """The student's outputs on all samples, after the host code's postprocessing where there is some."""
    host = Host(None) if spec.host is None else load_host(spec.host)
    return cases.gather([host.after(dict(case.expected)) for case in cases.samples])


def _served(cases: Cases) -> dict[str, Any]:
    """What a receiver gets on all samples."""
    paths = cases.raw or [case.path for case in cases.samples]
    outputs = cases.gather([replay.restore(replay.output_of(path)) for path in paths])
    return {name: value for name, value in outputs.items() if not name.startswith(_PREPARED)}


def shipped_feeds(path: Path) -> dict[str, Array]:
    """The graph's inputs that the shipped preprocessing made of a raw case."""
    outputs = replay.restore(replay.output_of(path))
    return {name.removeprefix(_PREPARED): v for name, v in outputs.items() if name.startswith(_PREPARED)}
