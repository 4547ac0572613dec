"""The student as an ONNX file: the only call of torch.onnx.export, and its failures in words."""

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from kd_exporter_onnx.errors import Refused, SpecError
from kd_exporter_onnx.spec import ExportSpec

# A protobuf message ends at 2 GiB; what is larger keeps its weights in model.onnx.data.
ONE_FILE_LIMIT = 1_900_000_000


class Graph(nn.Module):
    """The student with its inputs in the declared order and its outputs as a tuple in the declared order."""

    def __init__(self, module: nn.Module, spec: ExportSpec) -> None:
        super().__init__()
        self.module = module
        self.inputs, self.outputs = tuple(tensor.name for tensor in spec.inputs), spec.outputs
        self.by_name = set(self.inputs) <= inspect.signature(module.forward).parameters.keys()
        self.training = module.training  # its own flag only: .eval() would repair the student unasked

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.by_name:
            result = self.module(**dict(zip(self.inputs, tensors, strict=True)))
        else:
            result = self.module(*tensors)
        return select(result, self.outputs)


def select(result: Any, names: Sequence[str]) -> tuple[Tensor, ...]:
    """The named outputs of whatever a forward returned: mapping or model output by name, tuple in order."""
    if isinstance(result, Tensor):
        values: list[Any] = [result]
    elif isinstance(result, Mapping):
        values = [result.get(name) for name in names]
    elif isinstance(result, list | tuple) and not hasattr(result, "_fields"):
        values = list(result)
    else:
        values = [getattr(result, name, None) for name in names]
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        raise SpecError(f"forward returned {_kinds(result)}, which does not give the outputs {list(names)}")
    return tuple(values)


def _kinds(result: Any) -> str:
    if isinstance(result, Mapping):
        return f"a mapping of {sorted(map(str, result))}"
    if isinstance(result, list | tuple):
        return f"{len(result)} values"
    return "one tensor" if isinstance(result, Tensor) else f"a {type(result).__name__}"


@dataclass(frozen=True)
class Captured:
    """`used`: names of the parameters and buffers that the captured program reads."""

    path: Path
    used: frozenset[str]


def capture(
    module: nn.Module, spec: ExportSpec, feeds: Mapping[str, Tensor], opset: int, path: Path
) -> Captured:
    """Write `module` to `path`, traced on `feeds`; Refused says which construct has no fixed graph."""
    graph = Graph(module, spec)
    shapes = tuple({i: s for i, s in enumerate(t.shape) if spec.is_dynamic(s)} for t in spec.inputs)
    try:
        with quiet():
            program = torch.onnx.export(
                graph,
                tuple(feeds[name] for name in graph.inputs),
                dynamic_shapes=(shapes,),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise Refused("capture", in_words(error)) from error
    assert program is not None
    assert program.exported_program is not None
    ClearMetadataAndDocStringPass()(program.model)  # every node carries local source paths and lines
    program.save(path, external_data=_weight(module) > ONE_FILE_LIMIT)
    return Captured(path, frozenset(_used(program.exported_program)))


def _weight(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])


def _used(program: torch.export.ExportedProgram) -> Iterator[str]:
    """Names (in the student, not in the wrapper) of the weights that some operation reads."""
    signature = program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.users and node.name in names:
            yield names[node.name].removeprefix("module.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch prints the graph before it fails, and logs that torchvision is absent; what matters is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # deprecations inside torch and copyreg, shared axis names
            yield
    finally:
        logging.disable(before)


def in_words(error: BaseException) -> str:
    """What a failed capture means for the author of the student."""
    text = " ".join(str(e) for e in _causes(error))
    if "data-dependent" in text or "DataDependent" in text or "Data-dependent" in text:
        return (
            f"the forward takes a branch that depends on the values in a tensor{_line(text)}; a graph is "
            "fixed, and would keep one side for all inputs. Use torch.where or torch.cond, or branch outside"
        )
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text):
        return f"the operator {found[1]} has no ONNX form"
    if found := re.search(r"inferred a static shape of (\d+) for dimension ([^\s.]+)\.shape\[(\d+)\]", text):
        return f"axis {found[3]} of {found[2]} is declared dynamic, but the student fixes it at {found[1]}"
    root = str(list(_causes(error))[-1]).strip().splitlines()
    return f"torch.export could not capture the student: {root[0] if root else type(error).__name__}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(text: str) -> str:
    """' (`if x.sum() > 0:` at model.py:12)' where torch names the line; the folder stays private."""
    found = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+([^\n]+)', text)
    if not found:
        return ""
    file, number, code = found[-1]
    return f" (`{code.strip()}` at {Path(file).name}:{number})"
