"""What students, teachers, routers and augmentations promise."""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.kinds import frozen
from kdcore.testing.findings import BASICS, Failed, Skipped, check
from kdcore.testing.subjects import Subject
from kdcore.testing.tensors import copied, differing, finite, leaves, living, same
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
    if bad := [n for n, t in said.named() if isinstance(t, Tensor) and call.size and (not t.dim() or len(t) != call.size)]:
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
        raise Failed(f"inputs(batch) gave {type(found).__name__} without one tensor a name, first axis the batch")


@check("student", after=INFERENCE)
def deploy(s: Subject) -> None:
    """What is shipped must answer as what was judged: forward, then infer. Do: build deploy() from the same modules
    and rule, or leave it to kdcore's."""
    student, batch = s.fresh().eval(), copied(s.calls[0].args["batch"])
    wanted = _inferred(student, batch)
    module = student.deploy()
    inputs = [v.clone() for v in student.inputs(batch).values()]
    if isinstance(module, dict):
        raise Skipped(f"ships {len(module)} modules: {', '.join(module)}")
    with torch.no_grad():
        got = module.eval()(*inputs)
    if not isinstance(got, dict) or got.keys() != wanted.keys():
        raise Failed(f"deploy() gives {sorted(got) if isinstance(got, dict) else type(got).__name__}, infer {sorted(wanted)}")
    if names := differing(got, wanted):
        raise Failed(f"deploy() and forward-then-infer differ in {', '.join(names)}")
    if differing(_inferred(student, batch), wanted):
        raise Failed("deploy() changed the student")


@check("student", after=(*INFERENCE, "deploy"))
def training_only(s: Subject) -> None:
    """Parameters that only training needs are shipped for nothing. Do: leave them out in deploy()."""
    student, batch = s.fresh().eval(), copied(s.calls[0].args["batch"])
    module = student.deploy()
    if isinstance(module, dict):
        raise Skipped(f"ships {len(module)} modules")
    said = module.eval()(*student.inputs(batch).values())
    total = sum((t.float().square().sum() for t in said.values() if t.requires_grad), torch.zeros(()))
    if not total.requires_grad:
        raise Skipped("its output is not differentiable")
    total.backward()
    if unused := [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]:
        raise Failed(f"deploy() holds parameters that its output does not use: {', '.join(unused[:4])}")


@check("student")
def trains(s: Subject) -> None:
    """A student without gradient learns nothing. Do: look for detach, no_grad or frozen parameters."""
    student, batch = s.fresh().train(), s.calls[0].args["batch"]
    outputs = student(batch.copy())
    own = student.task_loss(outputs, batch)
    total = sum((t.float().square().mean() for t in leaves(outputs).values() if t.requires_grad), torch.zeros(()))
    if own is not None:
        total = total + sum((t.float().mean() for t in leaves(own).values()), torch.zeros(()))
    if not total.requires_grad:
        raise Failed("its outputs carry no gradient")
    total.backward()
    grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    if not any(bool(g.any()) for g in grads.values()) or not finite(grads):
        raise Failed("no parameter takes a finite gradient other than 0")


@check("student", after=(*INFERENCE, "deploy"))
def exports(s: Subject) -> None:
    """A student that cannot leave as ONNX helps nobody who serves. Do: read the exporter's words; keep the graph free of
    Python decisions on values."""
    if importlib.util.find_spec("kd_exporter_onnx") is None:
        raise Skipped("kd-exporter-onnx is not installed")
    student, batch = s.fresh().eval(), copied(s.calls[0].args["batch"])
    module = student.deploy()
    if isinstance(module, dict):
        raise Skipped(f"ships {len(module)} modules")
    _export(module.eval(), student.inputs(batch), list(_inferred(student, batch)))


def _export(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> None:
    from kd_exporter_onnx import ExportSpec, export  # type: ignore[import-not-found,unused-ignore]
    from kd_exporter_onnx.artefact import Axis, TensorSpec  # type: ignore[import-not-found,unused-ignore]

    arrays = {n: t.detach().numpy() for n, t in inputs.items()}
    specs = tuple(TensorSpec(name=n, dtype=str(a.dtype), shape=("batch", *a.shape[1:])) for n, a in arrays.items())
    size = len(next(iter(arrays.values())))
    spec = ExportSpec(inputs=specs, outputs=tuple(outputs), axes={"batch": Axis(min=1, max=size)}, samples=arrays)
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(module, spec, Path(folder) / "artefact", benchmark="none")
        except Exception as error:  # refused, or not exportable: both in its own words
            raise Failed(str(error)[:600]) from None


def _inferred(student: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        found = student.infer(student(copied(batch)))
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


# ---- routers ------------------------------------------------------------------------------------------


def _weights(s: Subject, args: dict[str, Any], router: Any = None) -> Tensor:
    found = (s.fresh().eval() if router is None else router)(*args.values())
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


@check("router", after=("runs",))
def weights_shape(s: Subject) -> None:
    """Each sample has one weight a teacher. Do: return [B,K], with one column more where labels_column is declared."""
    args, router = s.calls[0].args, s.fresh()
    wanted = (s.calls[0].size, len(args["teachers"]) + router.labels_column)
    weights = _weights(s, args)
    if tuple(weights.shape) != wanted or not weights.is_floating_point():
        raise Failed(f"weights {tuple(weights.shape)} of {weights.dtype}, not {wanted} of a floating type")
    for k in (1.0, 5e3, 0.0):
        loud = {"teachers": {n: o.at(slice(None)) for n, o in args["teachers"].items()}}
        for each in loud["teachers"].values():
            each.logits = None if each.logits is None else each.logits * k
        if not finite(_weights(s, {**args, **loud})):
            raise Failed(f"weights are not finite with teacher logits times {k:g}")


@check("router", after=("runs", "weights_shape"))
def weights_sum(s: Subject) -> None:
    """Weights that do not sum to 1 change the loss's scale unseen. Do: normalise over the teachers (the last axis), or
    declare sums_to_one = False."""
    if not s.fresh().sums_to_one:
        raise Skipped("declares sums_to_one = False")
    sums = _weights(s, s.calls[0].args).sum(-1)
    if not same(sums, torch.ones_like(sums), 1e-3):
        raise Failed(f"a sample's weights sum to {float(sums.min()):.4g} ... {float(sums.max()):.4g}")


@check("router", after=("runs", "weights_shape"))
def router_gradient(s: Subject) -> None:
    """A router with parameters learns through its weights. Do: look for detach, argmax or no_grad, or give it an
    own_optimizer."""
    router = s.fresh().eval()
    params = [p for p in router.parameters() if p.requires_grad]
    if not params or router.own_optimizer is not None:
        raise Skipped("has no parameters, or trains them itself")
    weights = _weights(s, s.calls[0].args, router)
    found = torch.autograd.grad(weights.square().sum(), params, allow_unused=True) if weights.requires_grad else ()
    if not any(g is not None and bool(g.any()) for g in found):
        raise Failed("no parameter takes gradient from the weights")


@check("router")
def plan(s: Subject) -> None:
    """The plan says which teachers run at all. Do: return a bool tensor [B,K], or None for all."""
    args, router = s.calls[0].args, s.fresh().eval()
    found = router.plan(args["batch"], args["student"])
    if found is None:
        return
    wanted = (s.calls[0].size, len(args["teachers"]))
    if not isinstance(found, Tensor) or found.dtype != torch.bool or tuple(found.shape) != wanted:
        raise Failed(f"plan is {getattr(found, 'dtype', type(found).__name__)} {tuple(getattr(found, 'shape', ()))}")


# ---- augmentations ------------------------------------------------------------------------------------


@check("augmentation")
def batch_kept(s: Subject) -> None:
    """Models and losses read the batch by key. Do: return a Batch with every key, each with its shape and type."""
    batch, new = _augmented(s)
    if not isinstance(new, Batch):
        raise Failed(f"returned {type(new).__name__}")
    old, found = leaves(batch), leaves(new)
    free = ("target",) if s.fresh().changes_labels else ()
    for name, value in old.items():
        if name not in found:
            raise Failed(f"{name!r} is gone")
        got = found[name]
        if name.rpartition("/")[2] not in free and (got.shape != value.shape or got.dtype != value.dtype):
            raise Failed(f"{name!r} was {tuple(value.shape)} {value.dtype}, and is {tuple(got.shape)} {got.dtype}")


@check("augmentation", after=(*BASICS, "batch_kept"))
def labels_kept(s: Subject) -> None:
    """Labels or ids that change unsaid spoil metrics, caches and the task loss. Do: leave target and id alone, or
    declare changes_labels = True."""
    if s.fresh().changes_labels:
        raise Skipped("declares changes_labels")
    batch, new = _augmented(s)
    words = ("id", "target", "label", "labels", "mask")
    names = [p for p in differing(batch, new, rel=0) if p.rpartition("/")[2] in words and p in leaves(batch)]
    if names:
        raise Failed(f"it changed {', '.join(names)}")


@check("augmentation", after=(*BASICS, "batch_kept"))
def inputs_as_declared(s: Subject) -> None:
    """A cached teacher answers for inputs as they were. Do: declare changes_inputs = True."""
    if s.fresh().changes_inputs:
        raise Skipped("declares changes_inputs")
    batch, new = _augmented(s)
    if names := [p for p in differing(batch, new, rel=0) if p in leaves(batch)]:
        raise Failed(f"declares changes_inputs = False, and changed {', '.join(names)}")


@check("augmentation")
def draw(s: Subject) -> None:
    """The next epoch's samples are indices of the data set. Do: return int64 indices within range, equal at every call
    for one epoch."""
    size = 24
    found = [s.fresh().draw(size, epoch) for epoch in (0, 0, 1)]
    if found[0] is None:
        return
    for each in found:
        if not isinstance(each, Tensor) or each.dtype != torch.int64 or each.dim() != 1 or not len(each):
            raise Failed(f"draw gave {getattr(each, 'dtype', type(each).__name__)}, not int64 indices")
        if int(each.min()) < 0 or int(each.max()) >= size:
            raise Failed(f"indices from {int(each.min())} to {int(each.max())} of {size} samples")
    if not torch.equal(found[0], found[1]):
        raise Failed("two calls for one epoch differ")


def _augmented(s: Subject) -> tuple[Batch, Any]:
    batch = s.calls[0].args["batch"]
    return batch, s.fresh().eval()(copied(batch))
