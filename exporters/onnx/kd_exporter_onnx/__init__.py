"""Export a trained student as a verified ONNX artefact, and load it where there is no torch and no kdcore."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kd_exporter_onnx.artefact import Artefact, Axis, TensorSpec
    from kd_exporter_onnx.benchmark import bench
    from kd_exporter_onnx.errors import ArtefactError, InputError, NoRuntimeError, Refused, SpecError
    from kd_exporter_onnx.exporter import OnnxExporter, export
    from kd_exporter_onnx.preprocess import Preprocessing
    from kd_exporter_onnx.runtime import Session, load
    from kd_exporter_onnx.spec import ExportSpec
    from kd_exporter_onnx.verification import verify

# Nothing is imported before it is asked for: a serving machine has no torch.
_HOME = {
    "artefact": ("Artefact", "Axis", "TensorSpec"),
    "benchmark": ("bench",),
    "errors": ("ArtefactError", "InputError", "NoRuntimeError", "Refused", "SpecError"),
    "exporter": ("OnnxExporter", "export"),
    "preprocess": ("Preprocessing",),
    "runtime": ("Session", "load"),
    "spec": ("ExportSpec",),
    "verification": ("verify",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Artefact",
    "ArtefactError",
    "Axis",
    "ExportSpec",
    "InputError",
    "NoRuntimeError",
    "OnnxExporter",
    "Preprocessing",
    "Refused",
    "Session",
    "SpecError",
    "TensorSpec",
    "bench",
    "export",
    "load",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
