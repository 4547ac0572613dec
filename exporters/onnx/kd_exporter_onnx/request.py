"""From a kdcore run: the request that the core makes of a student, as this exporter's ExportSpec."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_exporter_onnx.artefact import Axis, TensorSpec
from kd_exporter_onnx.errors import ArtefactError, Refused, SpecError
from kd_exporter_onnx.exporter import OnnxExporter
from kd_exporter_onnx.preprocess import Preprocessing
from kd_exporter_onnx.spec import ExportSpec
from kdcore.errors import InputError, KDError

if TYPE_CHECKING:
    from kdcore.kinds import ExportRequest


class RecipeExporter(OnnxExporter):
    """`[export] use = "onnx"`: OnnxExporter with what the run knows of its student."""

    def export_request(self, request: "ExportRequest", out: Path) -> dict[str, Any]:
        """The artefact at `out`; rows for the run's report. Raises KDError, and leaves nothing, on refusal."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                host = None
                if request.host is not None:
                    host = Path(scratch) / "host.py"
                    host.write_text(request.host, "utf-8")
                report = self.export(request.module, spec_of(request, host), out)
        except FileExistsError as error:
            raise InputError("export.out", str(error)) from error
        except SpecError as error:
            raise InputError("export", str(error)) from error
        except Refused as error:
            raise KDError(str(error)) from error
        for provider, why in report.parity.not_verified.items():
            todo = f"on the serving machine run: kd-verify {report.folder} --provider {provider}"
            print(f"warning: not verified on {provider} ({why}); {todo}", file=sys.stderr)
        return {
            "digest": report.digest,
            "verified on": ", ".join(report.artefact.verified),
            "verdict": " ".join(report.parity.lines()),
        }

    def bench(self, artefact: Path, student: Any, teacher: Any, **options: Any) -> Any:
        """`kd bench`: the artefact beside the student and its teacher in torch."""
        from kd_exporter_onnx.benchmark import bench

        try:
            return bench(artefact, student, teacher, **options)
        except ArtefactError as error:
            raise InputError(str(artefact), str(error), hint="kd export RUN writes one") from error


def spec_of(request: "ExportRequest", host: Path | None = None) -> ExportSpec:
    """The ExportSpec of a request, whose host code is in the file ``host``.

    Preprocessing without raw samples cannot be tried, and so is refused.
    """
    if request.preprocessing and request.raw_samples is None:
        raise InputError(
            "data.source",
            "the data has preprocessing steps but no raw samples to try them on",
            hint="give Data.raw(ids), or leave Data.preprocessing empty",
        )
    return ExportSpec(
        name=request.name,
        inputs=tuple(
            TensorSpec(name=name, dtype=str(request.samples[name].dtype), shape=shape)  # type: ignore[arg-type] # validated by pydantic
            for name, shape in request.shapes.items()
        ),
        outputs=tuple(request.rule),
        axes={name: Axis(min=low, max=high) for name, (low, high) in request.axes.items()},
        samples=request.samples,
        raw_samples=request.raw_samples if request.preprocessing or host else None,
        calibration=request.calibration or None,
        metric=request.metric,
        metric_name=request.metric_name or "metric",
        higher_is_better=request.higher_is_better,
        targets=request.targets,
        preprocessing=Preprocessing.model_validate(list(request.preprocessing)),
        labels=tuple(request.labels) if request.labels else None,
        source=request.provenance,
        absent=request.absent,
        rule=request.rule,
        host=host,
        reference_metric=request.reference_metric,
    )
