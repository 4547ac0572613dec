"""The gates on the module and on the graph. Each raises Refused with its own name, or returns what it saw."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from kd_exporter_onnx.artefact import TensorSpec
from kd_exporter_onnx.compare import difference
from kd_exporter_onnx.errors import Refused
from kd_exporter_onnx.spec import ExportSpec

RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)
STANDARD = frozenset(("", "ai.onnx"))
Seen = dict[str, Any]


def gate_eval(module: nn.Module) -> Seen:
    """Every submodule is in eval mode: dropout left on and batch statistics would be exported as they are."""
    training = [name or "the student itself" for name, child in module.named_modules() if child.training]
    if training:
        raise Refused("eval", f"in training mode: {', '.join(training[:5])}; call .eval() before the export")
    return {"submodules": sum(1 for _ in module.modules())}


def gate_pure(graph: nn.Module, feeds: tuple[Tensor, ...], names: tuple[str, ...]) -> Seen:
    """Two runs on the same samples are equal, and no parameter or buffer changes."""
    before = {name: value.clone() for name, value in _state(graph)}
    first = [value.clone() for value in graph(*feeds)]
    second = graph(*feeds)
    for name, value in zip(names, first, strict=True):
        if value.dtype == torch.bfloat16:
            raise Refused(
                "pure", "it is bfloat16, which numpy and most runtimes lack: return float32", output=name
            )
    for name, value in _state(graph):
        if name not in before or not torch.equal(_bits(before[name]), _bits(value)):
            raise Refused(
                "pure", f"the forward changes {name.removeprefix('module.')!r}; a graph keeps no state"
            )
    for name, one, two in zip(names, first, second, strict=True):
        found = difference(one.numpy(), two.numpy())
        if not found.within(1e-6):
            reason = (
                found.problem or "two runs on the same samples differ: something in the forward is random"
            )
            raise Refused(
                "pure", reason, output=name, sample=found.row, distance=found.relative, allowed=1e-6
            )
    return {"runs": 2}


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are not saved included."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)  # NaN equals itself here


def gate_absent(spec: ExportSpec, module: nn.Module, used: frozenset[str], model: onnx.ModelProto) -> Seen:
    """Training-only parts: neither read by the captured program, nor in the file by name, nor by value."""
    held = {tensor.name.removeprefix("module.") for tensor in model.graph.initializer}
    for what, names in (("the graph computes with", used), ("the file holds", held)):
        if wrong := sorted(name for name in names if _within(name, spec.absent)):
            raise Refused("absent", f"{what} the training-only part {wrong[0]!r}")
    forbidden = dict(_fingerprints(_forbidden(spec, module)))
    for tensor in model.graph.initializer:
        for key, _ in _fingerprints({tensor.name: _array(tensor)}):
            if key in forbidden:
                raise Refused(
                    "absent", f"{tensor.name!r} in the file equals the training-only {forbidden[key]!r}"
                )
    return {"parts": list(spec.absent), "compared_by_value": len(set(forbidden.values()))}


def _within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _forbidden(spec: ExportSpec, module: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    kept = {name: value for name, value in _state(module) if _within(name, spec.absent)}
    return {name: value.detach().numpy() for name, value in kept.items()} | spec.absent_weights


def _fingerprints(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[tuple[str, str]]:
    """Digest of the values, for a matrix also transposed; constants (zeros, ones) identify nothing."""
    for name, value in arrays.items():
        if value.size >= 4 and value.min() != value.max():
            for form in {value.ndim: [value], 2: [value, value.T]}[value.ndim]:
                yield (
                    hashlib.sha256(
                        repr(form.shape).encode() + np.ascontiguousarray(form).tobytes()
                    ).hexdigest(),
                    name,
                )


def _array(tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    return numpy_helper.to_array(tensor)


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of subgraphs and local functions included."""
    for holder in (model.graph, *model.functions):
        yield from _nodes(holder)


def _nodes(holder: Any) -> Iterator[onnx.NodeProto]:
    for node in holder.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(inner)


def gate_random(model: onnx.ModelProto) -> Seen:
    """No operator draws random numbers (an active Dropout included)."""
    active = {
        node.op_type
        for node in nodes(model)
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]
    }
    if found := sorted(({node.op_type for node in nodes(model)} & RANDOM) | active):
        raise Refused("random", f"the graph draws random numbers: {', '.join(found)}")
    return {"random_operators": 0}


def gate_domains(model: onnx.ModelProto, allowed: tuple[str, ...]) -> Seen:
    """Only standard ONNX operators, and those allowed by name as `domain::Operator`."""
    local = {(function.domain, function.name) for function in model.functions}
    custom = {(n.domain, n.op_type) for n in nodes(model) if n.domain not in STANDARD} - local
    named = {f"{domain}::{operator}" for domain, operator in custom}
    if wrong := sorted(named - set(allowed)):
        raise Refused(
            "domains", f"operators outside ONNX: {', '.join(wrong)}; allow them by name where you serve"
        )
    return {"custom_operators": sorted(named)}


def gate_axes(model: onnx.ModelProto, spec: ExportSpec) -> Seen:
    """Inputs and outputs have the declared names, inputs the declared dtypes, shapes and dynamic axes."""
    found = {value.name: describe(value) for value in model.graph.input}
    if [*found] != [tensor.name for tensor in spec.inputs]:
        raise Refused(
            "axes", f"the graph takes {sorted(found)}, declared are {[t.name for t in spec.inputs]}"
        )
    for tensor in spec.inputs:
        actual = found[tensor.name]
        if actual.dtype != tensor.dtype or not _same_shape(actual, tensor, spec):
            raise Refused("axes", f"input {tensor.name!r} is {actual.words()}, declared is {tensor.words()}")
    outputs = tuple(value.name for value in model.graph.output)
    if outputs != spec.outputs:
        raise Refused("axes", f"the graph gives {list(outputs)}, declared are {list(spec.outputs)}")
    return {"inputs": {name: tensor.words() for name, tensor in found.items()}}


def _same_shape(actual: TensorSpec, declared: TensorSpec, spec: ExportSpec) -> bool:
    def same(found: int | str, wanted: int | str) -> bool:
        if spec.is_dynamic(wanted):
            return isinstance(found, str)
        return found == (spec.axes[wanted].min if isinstance(wanted, str) else wanted)

    pairs = zip(actual.shape, declared.shape, strict=False)
    return len(actual.shape) == len(declared.shape) and all(same(*pair) for pair in pairs)


def describe(value: onnx.ValueInfoProto) -> TensorSpec:
    """An ONNX input or output as artefact.json describes it."""
    kind = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    return TensorSpec.model_construct(name=value.name, dtype=dtype, shape=shape)


def gate_checker(path: Path) -> Seen:
    """onnx.checker, with shape inference over the whole graph."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Refused("checker", f"onnx.checker: {str(error).splitlines()[0]}") from error
    return {"full_check": True}


def gate_files(folder: Path, private: Mapping[str, str]) -> Seen:
    """No file carries a local path (`private`: what it is -> the path), and none is a link."""
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        if path.is_symlink():
            raise Refused("files", f"{path.relative_to(folder)} is a link")
        for what, secret in private.items():
            if contains(path, secret.encode()):
                raise Refused("files", f"{path.relative_to(folder)} contains a local path ({what})")
    return {"searched_for": sorted(private)}


def contains(path: Path, wanted: bytes, block: int = 1 << 24) -> bool:
    """Whether a file holds these bytes; read in blocks, because a model can be larger than memory."""
    with path.open("rb") as stream:
        tail = b""
        while piece := stream.read(block):
            if wanted in tail + piece:
                return True
            tail = piece[-len(wanted) :]
    return False
