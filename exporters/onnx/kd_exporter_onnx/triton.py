"""The model repository for NVIDIA Triton Inference Server: triton/NAME/config.pbtxt and triton/NAME/1/."""

import os
import shutil
from pathlib import Path

from kd_exporter_onnx.artefact import MODEL, Artefact, Axis, TensorSpec

_TYPE = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "float64": "TYPE_FP64",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "bool": "TYPE_BOOL",
}


def write(folder: Path, artefact: Artefact) -> None:
    """The repository beside model.onnx; the model is a hard link where there are such, else a copy."""
    home = folder / "triton" / artefact.name
    (home / "1").mkdir(parents=True)
    (home / "config.pbtxt").write_text(config(artefact))
    for source in sorted(folder.glob(f"{MODEL}*")):
        _link(source, home / "1" / source.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def config(artefact: Artefact) -> str:
    """config.pbtxt. With one batch axis in front of everything, Triton may form batches itself."""
    axis = _batch(artefact)
    blocks = [
        f'name: "{artefact.name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {axis.max if axis else 0}",
    ]
    for kind, tensors in (("input", artefact.inputs), ("output", artefact.outputs)):
        blocks += [_tensor(kind, tensor, batched=axis is not None) for tensor in tensors]
    if axis and axis.min == axis.multiple_of == 1:
        blocks.append("dynamic_batching { }")
    device = "KIND_CPU" if artefact.target == "cpu" else "KIND_GPU"
    blocks.append(f"instance_group [ {{ kind: {device} }} ]")
    if artefact.target == "tensorrt":
        blocks.append(
            'optimization { execution_accelerators { gpu_execution_accelerator [ { name: "tensorrt" } ] } }'
        )
    return "\n".join(blocks) + "\n"


def _batch(artefact: Artefact) -> Axis | None:
    first = {tensor.shape[0] if tensor.shape else 0 for tensor in (*artefact.inputs, *artefact.outputs)}
    name = first.pop()
    return artefact.axes.get(name) if not first and isinstance(name, str) else None


def _tensor(kind: str, tensor: TensorSpec, *, batched: bool) -> str:
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = ", ".join(str(size if isinstance(size, int) else -1) for size in shape)
    # Triton has no empty dims: one value for each row is declared as [ 1 ] and reshaped to nothing.
    sizes = f"dims: [ {dims} ]" if shape else "dims: [ 1 ] reshape: { shape: [ ] }"
    return f'{kind} [ {{ name: "{tensor.name}" data_type: {_TYPE[tensor.dtype]} {sizes} }} ]'
