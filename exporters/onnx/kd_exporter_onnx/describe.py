"""What artefact.json says about an export: tensors, provenance, and which local paths must not be in it."""

import inspect
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import onnx
from torch import nn

from kd_exporter_onnx import __version__, gates
from kd_exporter_onnx.artefact import MODEL, Artefact, Precision, Provenance, Provider, TensorSpec
from kd_exporter_onnx.errors import SpecError
from kd_exporter_onnx.spec import ExportSpec

_LIBRARIES = ("kdcore", "torch", "transformers", "onnx", "onnxscript", "numpy")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def describe(
    folder: Path,
    spec: ExportSpec,
    *,
    opset: int,
    precision: Precision,
    quantisation: Literal["static", "dynamic"] | None,
    target: Provider,
    verified: tuple[Provider, ...],
    tolerance: float,
) -> Artefact:
    """The description of model.onnx in `folder`, without digests."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    outputs = tuple(_output(value) for value in model.graph.output)
    _check_labels(spec, outputs[0])
    return Artefact(
        name=spec.name,
        inputs=spec.inputs,
        outputs=outputs,
        axes=spec.axes,
        raw_inputs=spec.receiver_inputs(),
        preprocessing=spec.preprocessing,
        host_code=spec.host is not None,
        labels=spec.labels,
        opset=opset,
        precision=precision,
        quantisation=quantisation,
        target=target,
        verified=verified,
        tolerance=tolerance,
        compare_where=spec.compare_where,
        provenance=Provenance(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            machine=f"{platform.system()} {platform.machine()}",
            source=spec.source,
        ),
    )


def _output(value: onnx.ValueInfoProto) -> TensorSpec:
    return TensorSpec.model_validate(gates.describe(value).model_dump())


def _check_labels(spec: ExportSpec, first: TensorSpec) -> None:
    if spec.host is not None:
        return  # host code may end in something else than the graph's classes
    axis = 1 if len(first.shape) == 4 else -1  # [B, C, H, W] of segmentation
    classes = first.shape[axis] if first.shape else None
    if spec.labels is not None and isinstance(classes, int) and len(spec.labels) != classes:
        raise SpecError(f"{len(spec.labels)} labels for the {classes} values of output {first.name!r}")


def versions() -> dict[str, str]:
    """The versions of what made the artefact, as far as installed."""
    found = {"python": platform.python_version(), "kd-exporter-onnx": __version__}
    for name in (*_LIBRARIES, *_RUNTIMES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def private_paths(module: nn.Module) -> dict[str, str]:
    """What must not be found in any file: folders of this machine, by what they are.

    Short ones (a working directory `/`) are left out: they occur in any weights by chance.
    """
    folders = {
        "working directory": Path.cwd(),
        "home": Path.home(),
        "temporary folder": Path(tempfile.gettempdir()),
        "Python environment": Path(sys.prefix),
    }
    if source := _source(module):
        folders["the student's source"] = source.parent
    named = {what: f"{path}{os.sep}" for what, path in folders.items()}
    return {what: path for what, path in named.items() if len(path) > 5}


def _source(module: nn.Module) -> Path | None:
    try:
        file = inspect.getsourcefile(type(module))
    except TypeError:  # a class typed into an interpreter has no file
        return None
    return Path(file).resolve() if file else None
