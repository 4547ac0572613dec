"""What students and teachers promise."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.building import Builder
from kdcore.kinds import ExportRequest, frozen
from kdcore.plugins import registry
from kdcore.testing.findings import BASICS, Failed, Skipped, check
from kdcore.testing.subjects import Subject
from kdcore.testing.tensors import copied, differing, finite, leaves
from kdcore.types import Batch, Outputs

INFERENCE = (*BASICS, "has_inputs")


@check("student", "teacher", after=("runs",))
def outputs(s: Subject) -> None:
    """Losses and taps read Outputs, whose tensors have a row a sample. Do: return kdcore.Outputs(logits, ...)."""
    call, model = s.calls[0], s.fresh().eval()
    with torch.no_grad():
        said = model(copied(call.args["batch"]))
    if not isinstance(said, Outputs):
        raise Failed(f"forward gives {type(said).__name__}")
    if bad := [
        n
        for n, t in said.named()
        if isinstance(t, Tensor) and call.size and (not t.dim() or len(t) != call.size)
    ]:
        raise Failed(f"{bad[0]} is {tuple(said[bad[0]].shape)} for {call.size} samples")


# ---- students -----------------------------------------------------------------------------------------


@check("student")
def has_inputs(s: Subject) -> None:
    """The export asks the student which of a batch's values its graph takes. Do: write inputs(batch) -> dict of
    tensors."""
    student, batch = s.fresh().eval(), copied(s.calls[0].args["batch"])
    try:
        found = student.inputs(batch)
    except Exception as error:  # whatever it is, the export would meet it
        raise Failed(f"{type(error).__name__}: {error}") from None
    if not found or not all(isinstance(v, Tensor) and len(v) == len(batch) for v in found.values()):
        raise Failed(
            f"inputs(batch) gave {type(found).__name__} without one tensor a name, first axis the batch"
        )


@check("student", after=INFERENCE)
def deploy(s: Subject) -> None:
    """What is shipped must answer as what was judged: forward, then infer. Do: build deploy() from the same modules
    and rule, or leave it to kdcore's."""
    student, batch, module = _shipped(s)
    for part in (batch, batch.rows(torch.arange(1))):
        wanted = _inferred(student, part)
        with torch.no_grad():
            got = module(*(v.clone() for v in student.inputs(part).values()))
        if not isinstance(got, dict) or got.keys() != wanted.keys():
            named = sorted(got) if isinstance(got, dict) else type(got).__name__
            raise Failed(f"deploy() gives {named}, graph() {sorted(wanted)}")
        if names := differing(got, wanted):
            raise Failed(
                f"deploy() and forward-then-infer differ in {', '.join(names)}, batch of {len(part)}"
            )
    if differing(wanted, _inferred(_stirred(s), part)):
        raise Failed("deploy() changed the student")


@check("student", after=(*INFERENCE, "deploy"))
def training_only(s: Subject) -> None:
    """Parameters that only training needs are shipped for nothing. Do: leave them out in deploy()."""
    student, batch, module = _shipped(s)
    said = module(*student.inputs(batch).values())
    total = sum((t.float().square().sum() for t in said.values() if t.requires_grad), torch.zeros(()))
    if not total.requires_grad:
        raise Skipped("its output is not differentiable")
    total.backward()
    if unused := [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]:
        raise Failed(f"deploy() holds parameters that its output does not use: {', '.join(unused[:4])}")


@check("student", after=(*INFERENCE, "deploy"))
def exports(s: Subject) -> None:
    """A student that cannot leave as ONNX helps nobody who serves. Do: read the exporter's words; keep the graph free of
    Python decisions on values."""
    if not any(component.name == "onnx" for _, _, component in registry().components("exporter")):
        raise Skipped("kd-exporter-onnx is not installed")
    student, batch, module = _shipped(s)
    inputs = {name: value.detach() for name, value in student.inputs(batch).items()}
    shapes, axes = student.shapes(inputs)
    rule = {name: value.detach().numpy() for name, value in _inferred(student, batch).items()}
    samples = {name: value.numpy() for name, value in inputs.items()}
    host, raw = student.host(batch) or (None, None)
    request = ExportRequest("student", module, shapes, axes, samples, rule, host=host, raw_samples=raw)
    exporter = Builder(0).make("exporter", "onnx", {"benchmark": "none"}, "export")
    with tempfile.TemporaryDirectory() as folder:
        try:
            exporter.export_request(request, Path(folder) / "artefact")
        except Exception as error:  # refused, or not exportable: both in its own words
            raise Failed(str(error)[:600]) from None


@check("student")
def trains(s: Subject) -> None:
    """A student without gradient learns nothing. Do: look for detach, no_grad or frozen parameters."""
    student, batch = s.fresh().train(), s.calls[0].args["batch"]
    outputs = student(batch.copy())
    own = student.task_loss(outputs, batch)
    total = sum(
        (t.float().square().mean() for t in leaves(outputs).values() if t.requires_grad), torch.zeros(())
    )
    if own is not None:
        total = total + sum((t.float().mean() for t in leaves(own).values()), torch.zeros(()))
    if not total.requires_grad:
        raise Failed("its outputs carry no gradient")
    total.backward()
    grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    if not any(bool(g.any()) for g in grads.values()) or not finite(grads):
        raise Failed("no parameter takes a finite gradient other than 0")


def _shipped(s: Subject) -> tuple[Any, Batch, nn.Module]:
    """A student in eval mode, a batch, and what it ships."""
    student, batch = _stirred(s), copied(s.calls[0].args["batch"])
    module = student.deploy()
    if isinstance(module, dict):
        raise Skipped(f"ships {len(module)} modules: {', '.join(module)}")
    return student, batch, module.eval()


def _stirred(s: Subject) -> Any:
    """A student in eval mode whose weights have moved since it was made, as after training."""
    student, generator = s.fresh().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(parameter.dtype))
    return student


def _inferred(student: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        found = student.graph(student(copied(batch)))
    return {name: value.clone() for name, value in found.items()}


# ---- teachers -----------------------------------------------------------------------------------------


@check("teacher", after=("runs",))
def frozen_eval(s: Subject) -> None:
    """A teacher with live dropout, moving statistics or weights is another one at every step. Do: never call train()
    inside, use no inference_mode, and change nothing in forward."""
    teacher, batch = frozen(s.fresh()), s.calls[0].args["batch"]
    teacher.train()
    before = {n: t._version for n, t in [*teacher.named_parameters(), *teacher.named_buffers()]}
    with torch.no_grad():
        said = leaves(teacher(batch.copy()))
    if any(m.training for m in teacher.modules()):
        raise Failed("it is in training mode after a forward")
    after = {n: t._version for n, t in [*teacher.named_parameters(), *teacher.named_buffers()]}
    if moved := [n for n in after if after[n] != before.get(n, after[n])]:
        raise Failed(f"forward wrote to {', '.join(moved[:3])}")
    if any(t.requires_grad for t in said.values()) or any(p.requires_grad for p in teacher.parameters()):
        raise Failed("it takes gradient although it was frozen")
    if any(t.is_inference() for t in said.values()):
        raise Failed("its outputs come from inference_mode: losses cannot save them for backward")
