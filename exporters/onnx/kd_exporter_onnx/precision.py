"""fp16 and int8 of an fp32 graph, by onnxruntime's own converters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from kd_exporter_onnx.capture import ONE_FILE_LIMIT, quiet
from kd_exporter_onnx.errors import SpecError
from kd_exporter_onnx.gates import nodes
from kd_exporter_onnx.grid import chunk_size
from kd_exporter_onnx.spec import Array, ExportSpec

Int8 = Literal["static", "dynamic"]


def quantise(source: Path, target: Path, how: Int8 | Literal["auto"], spec: ExportSpec) -> Int8:
    """Write the int8 graph, and say how it was quantised."""
    chosen = choose_int8(source) if how == "auto" else how
    if chosen == "dynamic":
        dynamic_int8(source, target)
    elif spec.calibration is None:
        raise SpecError(
            "this student is convolutional, so int8 is static: give calibration, real training samples"
        )
    else:
        static_int8(source, target, spec)
    return chosen


def choose_int8(source: Path) -> Int8:
    """static for convolutional graphs, dynamic for transformers and plain matrix products.

    Measured: dynamic makes a CNN 4 times slower, static costs a ViT 29 % of its agreement. A transformer
    multiplies computed matrices with each other (attention) more often than it convolves.
    """
    model = onnx.load(source, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    every = list(nodes(model))
    convolutions = sum(node.op_type == "Conv" for node in every)
    computed = sum(node.op_type == "MatMul" and not weights & set(node.input) for node in every)
    return "static" if convolutions > computed else "dynamic"


def half(source: Path, target: Path) -> None:
    """Weights and arithmetic in fp16; inputs and outputs keep their dtypes."""
    with quiet():  # it warns of every value outside fp16's range; parity and metric judge what that does
        model = OnnxModel(convert_float_to_float16(onnx.load(source), keep_io_types=True))
        model.topological_sort()  # the converter puts its casts at the end, which onnx.checker refuses
    onnx.save(model.model, target, save_as_external_data=_large(source), location=f"{target.name}.data")


def static_int8(source: Path, target: Path, spec: ExportSpec) -> None:
    """QDQ: activations uint8 with ranges from real training samples, weights int8."""
    with quiet():
        quantize_static(
            _bare(source),
            target,
            _Samples(spec),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=_large(source),
        )


def dynamic_int8(source: Path, target: Path) -> None:
    """Weights int8, ranges of activations from every run. Convolutions stay float: that kernel is slow."""
    with quiet():
        quantize_dynamic(
            _bare(source),
            target,
            op_types_to_quantize=["Gemm", "MatMul"],
            weight_type=QuantType.QInt8,
            use_external_data_format=_large(source),
        )


def _bare(source: Path) -> onnx.ModelProto:
    """Without inferred shapes: the quantiser transposes weights and then trips over the old shapes."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    return model


def _large(source: Path) -> bool:
    data = source.with_name(f"{source.name}.data")
    return sum(path.stat().st_size for path in (source, data) if path.exists()) > ONE_FILE_LIMIT


class _Samples(CalibrationDataReader):
    """The calibration samples in batches of the size that the export verifies with."""

    def __init__(self, spec: ExportSpec) -> None:
        self._batches = _batches(spec.calibration or {}, chunk_size(spec))

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def _batches(samples: dict[str, Array], size: int) -> Iterator[dict[str, Any]]:
    count = len(next(iter(samples.values())))
    for start in range(0, count, size):
        rows = [(start + offset) % count for offset in range(size)]
        yield {name: value[rows] for name, value in samples.items()}
