"""`export`: build in a temporary folder, pass every gate, seal, reload, rename."""

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from kd_exporter_onnx.artefact import Precision, Provider
from kd_exporter_onnx.build import Build, Options
from kd_exporter_onnx.errors import SpecError
from kd_exporter_onnx.report import Report
from kd_exporter_onnx.spec import ExportSpec


class OnnxExporter:
    """A recipe's `[export] use = "onnx"`; the keyword arguments are its parameters.

    Args:
        precision: fp32; fp16 and int8 are converted from a verified fp32 graph.
        provider: where it will serve; absent here, the artefact ships as verified on the CPU only.
        opset: of the standard ONNX operators.
        max_drop: how much worse the metric may be as served than in torch, in the metric's own unit.
        tolerance: largest difference of an output as a share of its scale; default 1e-4 (fp32), 1e-2 (fp16).
        int8: how to quantise; auto is static for convolutional students and dynamic for transformers.
        allow_operators: operators outside ONNX that the serving runtime has, as `domain::Operator`.
        benchmark: quick times torch eager and onnxruntime; full adds torch.compile and batch sizes.
        overwrite: replace an artefact at the destination, after the new one has passed.
    """

    def __init__(
        self,
        *,
        precision: Precision = "fp32",
        provider: Provider = "cpu",
        opset: Annotated[int, Field(ge=18, le=23)] = 20,
        max_drop: Annotated[float, Field(ge=0)] = 0.01,
        tolerance: float | None = None,
        int8: Literal["auto", "static", "dynamic"] = "auto",
        allow_operators: tuple[str, ...] = (),
        benchmark: Literal["none", "quick", "full"] = "quick",
        overwrite: bool = False,
    ) -> None:
        self.options = Options(
            precision=precision,
            provider=provider,
            opset=opset,
            max_drop=max_drop,
            tolerance=tolerance,
            int8=int8,
            allow_operators=tuple(allow_operators),
            benchmark=benchmark,
        )
        self.overwrite = overwrite

    def export(self, module: nn.Module, spec: ExportSpec, out: str | Path) -> Report:
        """The artefact at `out`, or an error and nothing at `out` (what was there before stays).

        Raises SpecError before anything runs, FileExistsError, and Refused with the gate, output and sample.
        """
        out = Path(out).absolute()
        if out.exists() and not self.overwrite:
            raise FileExistsError(f"{out} exists; choose another folder, or overwrite=True")
        _check(module, spec, self.options)
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the destination, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            with torch.no_grad():
                report = Build(module, spec, self.options, Path(work)).run()
            _move(report.folder, out, Path(work))
        return report.model_copy(update={"folder": out})


def _move(folder: Path, out: Path, work: Path) -> None:
    if out.exists():
        out.rename(work / "replaced")
    folder.rename(out)


def _check(module: nn.Module, spec: ExportSpec, options: Options) -> None:
    places = {str(value.device) for value in [*module.parameters(), *module.buffers()]} - {"cpu"}
    if places:
        raise SpecError(f"the student has weights on {sorted(places)}: call .cpu() first")
    if options.precision == "int8" and spec.metric is None:
        raise SpecError("int8 is judged by the task metric: give metric and targets")
    if options.int8 == "static" and spec.calibration is None:
        raise SpecError("static int8 needs calibration: real training samples")


def export(module: nn.Module, spec: ExportSpec, out: str | Path, **parameters: Any) -> Report:
    """Export a plain nn.Module; `parameters` are those of OnnxExporter.

    Returns the report of a finished artefact; raises Refused, and leaves nothing, when any gate fails.
    """
    return OnnxExporter(**parameters).export(module, spec, out)
