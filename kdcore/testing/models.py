"""What students and teachers promise."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.building import Builder
from kdcore.kinds import ExportRequest, frozen
from kdcore.plugins import registry
from kdcore.testing.findings import BASICS, DECLARED, Skipped, check, fail_if, skip_if
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import copied, differing, finite, leaves
from kdcore.types import Batch, Outputs

INFERENCE = (*BASICS, "has_inputs")


@check("student", "teacher", after=(*DECLARED, "runs"))
def outputs(s: Subject, call: Call) -> None:
    """Losses and taps read Outputs, whose tensors have a row a sample. Do: return kdcore.Outputs(logits, ...)."""
    with torch.no_grad():
        said = s.fresh().eval()(copied(call.args["batch"]))
    fail_if(not isinstance(said, Outputs), f"forward gives {type(said).__name__}")
    shapes = {name: tuple(t.shape) for name, t in said.named() if isinstance(t, Tensor)}
    bad = [f"{name} is {shape}" for name, shape in shapes.items() if call.size and shape[:1] != (call.size,)]
    fail_if(bad, f"{', '.join(bad)} for {call.size} samples")


# ---- students -----------------------------------------------------------------------------------------


@check("student")
def has_inputs(s: Subject, call: Call) -> None:
    """The export asks the student which of a batch's values its graph takes. Do: set input_names, or write
    inputs(batch) -> dict of tensors."""
    batch = copied(call.args["batch"])
    found = s.fresh().eval().inputs(batch)
    fine = found and all(isinstance(v, Tensor) and len(v) == len(batch) for v in found.values())
    fail_if(not fine, "inputs(batch) gives no dict with one tensor a name, first axis the batch")


@check("student", after=INFERENCE)
def deploy(s: Subject, call: Call) -> None:
    """What is shipped must answer as what was judged: forward, then infer. Do: build deploy() from the same modules
    and rule, or leave it to kdcore's."""
    student, batch, rule, module = _shipped(s, call)
    fail_if(differing(rule, _inferred(student, batch)), "deploy() changed the student")
    for part in (batch, batch.rows(torch.arange(1))):
        wanted = _inferred(student, part)
        with torch.no_grad():
            got = module(*(value.clone() for value in student.inputs(part).values()))
        names = list(got) if isinstance(got, dict) else type(got).__name__
        fail_if(set(names) != set(wanted), f"deploy() gives {names}, graph() {list(wanted)}")
        wrong = ", ".join(differing(got, wanted))
        fail_if(wrong, f"deploy() and forward-then-infer differ in {wrong}, batch of {len(part)}")


@check("student", after=(*INFERENCE, "deploy"))
def training_only(s: Subject, call: Call) -> None:
    """Parameters that only training needs are shipped for nothing. Do: leave them out in deploy()."""
    student, batch, _, module = _shipped(s, call)
    said = module(*student.inputs(batch).values())
    total = sum((t.float().square().sum() for t in said.values()), torch.zeros(()))
    skip_if(not total.requires_grad, "its output is not differentiable")
    total.backward()
    unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    fail_if(unused, f"deploy() holds parameters that its output does not use: {', '.join(unused[:4])}")


@check("student", after=(*INFERENCE, "deploy"))
def exports(s: Subject, call: Call) -> None:
    """A student that cannot leave as ONNX helps nobody who serves. Do: read the exporter's words; keep the graph free of
    Python decisions on values."""
    onnx = any(component.name == "onnx" for _, _, component in registry().components("exporter"))
    skip_if(not onnx, "kd-exporter-onnx is not installed")
    student, batch, rule, module = _shipped(s, call)
    shapes, axes = student.shapes(inputs := student.inputs(batch))
    samples, said = ({name: value.numpy() for name, value in each.items()} for each in (inputs, rule))
    host, raw = student.host(batch) or (None, None)
    request = ExportRequest("student", module, shapes, axes, samples, said, host=host, raw_samples=raw)
    exporter = Builder(0).make("exporter", "onnx", {"benchmark": "none"}, "export")
    with tempfile.TemporaryDirectory() as folder:
        exporter.export_request(request, Path(folder) / "artefact")


@check("student")
def trains(s: Subject, call: Call) -> None:
    """A student without gradient learns nothing. Do: look for detach, no_grad or frozen parameters."""
    student, batch = s.fresh().train(), call.args["batch"]
    said = student(batch.copy())
    own = [t.float().mean() for t in leaves(student.task_loss(said, batch)).values()]
    total = sum([*own, *(t.float().square().mean() for t in leaves(said).values())], torch.zeros(()))
    fail_if(not total.requires_grad, "its outputs carry no gradient")
    total.backward()
    grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    learns = finite(grads) and any(bool(g.any()) for g in grads.values())
    fail_if(not learns, "no parameter takes a finite gradient other than 0")


def _shipped(s: Subject, call: Call) -> tuple[Any, Batch, dict[str, Tensor], nn.Module]:
    """A student in eval mode whose weights have moved, as after training; a batch; its inference; what it ships."""
    student, batch, generator = s.fresh().eval(), copied(call.args["batch"]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(parameter.dtype))
    rule, module = _inferred(student, batch), student.deploy()
    if isinstance(module, dict):
        raise Skipped(f"ships {len(module)} modules: {', '.join(module)}")
    return student, batch, rule, module.eval()


@torch.no_grad()
def _inferred(student: Any, batch: Batch) -> dict[str, Tensor]:
    found = student.graph(student(copied(batch)))
    named = isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values())
    fail_if(not named, f"infer() gives {type(found).__name__}, not a dict of tensors by name")
    return {name: value.clone() for name, value in found.items()}


# ---- teachers -----------------------------------------------------------------------------------------


@check("teacher", after=(*DECLARED, "runs"))
def frozen_eval(s: Subject, call: Call) -> None:
    """A teacher with live dropout, moving statistics or weights is another one at every step. Do: never call train()
    inside, use no inference_mode, and change nothing in forward."""
    teacher = frozen(s.fresh())
    teacher.train()
    before = _versions(teacher)
    with torch.no_grad():
        said = leaves(teacher(call.args["batch"].copy())).values()
    fail_if(any(module.training for module in teacher.modules()), "it is in training mode after a forward")
    moved = [name for name, version in _versions(teacher).items() if version != before.get(name, version)]
    fail_if(moved, f"forward wrote to {', '.join(moved[:3])}")
    live = any(tensor.requires_grad for tensor in (*said, *teacher.parameters()))
    fail_if(live, "it takes gradient although it was frozen")
    inference = any(tensor.is_inference() for tensor in said)
    fail_if(inference, "its outputs come from inference_mode: losses cannot save them for backward")


def _versions(module: nn.Module) -> dict[str, int]:
    return {n: t._version for n, t in (*module.named_parameters(), *module.named_buffers())}
