"""README.md of an artefact, for the person who receives it."""

from kd_exporter_onnx.artefact import Artefact, TensorSpec
from kd_exporter_onnx.providers import CPU_COMMAND, GPU_COMMAND
from kd_exporter_onnx.report import Parity

_GPU = """
## On another provider

`load(folder, provider="cuda")` refuses until this has run on the serving machine:

    kd-verify FOLDER --provider cuda

It needs no torch, compares the outputs in example.npz, looks where every operator ran, and writes its record
beside the manifest."""
_INT8 = " Run `kd-verify FOLDER` on another model of CPU too: int8 sums saturate on some of them."
_FILES = """
## Files

- model.onnx: the graph
- artefact.json: this description, for programs
- parity.json: every check, with its numbers
- benchmark.json: latency, as measured at export
- example.npz: inputs (`input/NAME`) and the outputs they must give (`output/NAME`); real evaluation samples
- MANIFEST.sha256: `sha256sum -c MANIFEST.sha256`
- triton: start Triton with `--model-repository=triton`
"""


def card(artefact: Artefact, parity: Parity) -> str:
    """Use, inputs, outputs, preprocessing, what was verified, what to do on a GPU."""
    lines = [f"# {artefact.name}", "", _head(artefact), "", *_use(artefact), "", *_inputs(artefact)]
    lines += ["", "## Outputs", "", *_table(artefact.outputs)]
    if artefact.labels:
        lines += ["", f"Labels, in order: {', '.join(artefact.labels)}."]
    lines += ["", *_preparation(artefact), "", "## What was verified", ""]
    lines += [f"- {line}" for line in parity.lines()]
    if {"cuda", "tensorrt"} - set(artefact.verified):
        lines.append(_GPU)
    if artefact.precision == "int8":
        lines.append(_INT8)
    return "\n".join([*lines, _FILES])


def _head(artefact: Artefact) -> str:
    how = f", {artefact.quantisation} quantisation" if artefact.quantisation else ""
    where = ", ".join(artefact.verified)
    return f"An ONNX model, opset {artefact.opset}, {artefact.precision}{how}; verified on {where}."


def _use(artefact: Artefact) -> list[str]:
    given = ", ".join(f'"{tensor.name}": {tensor.name}' for tensor in artefact.raw_inputs)
    code = ", host_code=True" if artefact.host_code else ""
    return [
        "## Use",
        "",
        f"    {CPU_COMMAND}    # or, with an NVIDIA GPU: {GPU_COMMAND}",
        "",
        "```python",
        "from kd_exporter_onnx import load",
        "",
        f'session = load("{artefact.name}"{code})  # the path of this folder; its digests are checked first',
        f"outputs = session({{{given}}})  # numpy or torch",
        f'print(session.provider, outputs["{artefact.outputs[0].name}"].shape)',
        "```",
    ]


def _inputs(artefact: Artefact) -> list[str]:
    ranges = [f"- {name}: {axis.words()}" for name, axis in artefact.axes.items()]
    return ["## Inputs", "", *_table(artefact.raw_inputs), "", *ranges]


def _table(tensors: tuple[TensorSpec, ...]) -> list[str]:
    rows = [f"| {t.name} | {t.dtype} | {', '.join(map(str, t.shape))} |" for t in tensors]
    return ["| name | dtype | shape |", "|---|---|---|", *rows]


def _preparation(artefact: Artefact) -> list[str]:
    if not artefact.preprocessing and not artefact.host_code:
        return ["The graph takes these inputs as they are; there is no preprocessing."]
    steps = [f"1. `{step.model_dump_json(exclude_none=True)}`" for step in artefact.preprocessing.steps]
    code = ["Part of the work is Python, in host.py: read it before you load with host_code=True.", ""]
    return [
        "## Preprocessing",
        "",
        *(code if artefact.host_code else []),
        "The loader does this; model.onnx itself, and Triton, take what comes after it:",
        "",
        *steps,
        "",
        *(f"- graph input {tensor.name}: {tensor.words()}" for tensor in artefact.inputs),
    ]
