"""What an export found: parity.json, and the report that `export` returns."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from kd_exporter_onnx.artefact import Artefact, Provider
from kd_exporter_onnx.grid import Point
from kd_exporter_onnx.metric import MetricDrop
from kd_exporter_onnx.parity import Compared


class Parity(BaseModel):
    """parity.json: every gate that was passed with what it saw, and the numbers behind the verdict."""

    model_config = ConfigDict(extra="forbid")
    gates: dict[str, Any] = {}
    tolerance: float
    judged_by_metric: bool = False
    compared: list[Compared] = []
    left_out: list[Point] = []
    samples: int = 0
    metric: MetricDrop | None = None
    placement: dict[Provider, dict[str, dict[str, int]]] = {}
    not_verified: dict[Provider, str] = {}

    def worst(self) -> Compared | None:
        return max(self.compared, key=lambda one: one.difference, default=None)

    def lines(self) -> list[str]:
        """The verdict in a few sentences."""
        points = {tuple(one.point.items()) for one in self.compared}
        lines = [f"{self.samples} real samples and {len(points)} sizes of the dynamic axes were compared."]
        worst = self.worst()
        if worst and self.judged_by_metric:
            lines.append(
                f"int8 values are judged by the metric; largest difference {worst.difference:.2g} of scale."
            )
        elif worst:
            lines.append(
                f"Largest difference: {worst.difference:.2g} of the scale of {worst.output!r} "
                f"(tolerance {self.tolerance:.2g})."
            )
        if m := self.metric:
            lines.append(
                f"{m.name}: {m.served:.4g} as served, {m.reference:.4g} in torch; "
                f"at most {m.allowed:g} lost is allowed."
            )
        lines += [f"Not verified on {name}: {why}" for name, why in self.not_verified.items()]
        return lines


class Report(BaseModel):
    """A finished export. Keep `digest` elsewhere: load(folder, digest=...) then also finds a forgery."""

    folder: Path
    digest: str
    artefact: Artefact
    parity: Parity

    def __str__(self) -> str:
        on = ", ".join(self.artefact.verified)
        return "\n".join([f"{self.folder}: verified on {on}, digest {self.digest}", *self.parity.lines()])
