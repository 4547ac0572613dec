"""One training step of other frameworks, with the mathematics of bench_step.objective. Used by bench_step --peers.

None of them is a dependency. Those that import are measured; the others are named, with the reason:

    pip install nvidia-modelopt==0.47.0 requests
    pip install --no-deps torchdistill==1.1.5       # asks for torchvision, which the step does not use: a stub stands in
    git clone https://github.com/megvii-research/mdistiller && export MDISTILLER=mdistiller    # not on the index
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Step = Callable[[Any], float]
Models = Callable[[], tuple[nn.Module, nn.Module]]


def _sgd(student: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)


def modelopt(models: Models, temperature: float) -> Step:
    """ModelOpt: the student converted in place, the teacher inside it."""
    mtd = importlib.import_module("modelopt.torch.distill")
    student, teacher = models()
    loss = mtd.LogitsDistillationLoss(temperature, reduction="batchmean")
    balancer = mtd.StaticLossBalancer(0.5)
    config = {"teacher_model": teacher, "criterion": loss, "loss_balancer": balancer}
    model = mtd.convert(student, [("kd_loss", config)])
    model.train()
    optimizer = _sgd(student)

    def step(batch: Any) -> float:
        logits = model(batch["input"])
        # The static balancer halves both terms; doubled, the sum is the others'.
        total = 2 * model.compute_kd_loss(student_loss=F.cross_entropy(logits, batch["target"]))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return float(total.detach())

    return step


class _Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    __version__ = "none"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def _without_torchvision() -> None:
    for name in ("", ".models", ".models.densenet", ".models.resnet", ".datasets", ".transforms"):
        sys.modules.setdefault(f"torchvision{name}", _Stub(f"torchvision{name}"))


def torchdistill(models: Models, temperature: float) -> Step:
    """torchdistill's DistillationBox: both models hooked by module path, a weighted sum of losses."""
    _without_torchvision()
    get_distillation_box = importlib.import_module("torchdistill.core.distillation").get_distillation_box
    student, teacher = models()
    head = [name for name, _ in teacher.named_children()][-1]
    sides = {
        f"{side}_module_{what}": value
        for side in ("student", "teacher")
        for what, value in (("path", head), ("io", "output"))
    }
    kd = {"key": "KDLoss", "kwargs": {**sides, "temperature": temperature, "alpha": 1.0, "beta": 1.0}}
    side = {"forward_proc": "forward_batch_only", "forward_hook": {"output": [head]}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {},
        "val_data_loader": {},
        "teacher": {**side, "requires_grad": False},
        "student": side,
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9}},
    }
    box = get_distillation_box(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    box.teacher_model.eval()  # left in training mode, its batch norm drifts

    def step(batch: Any) -> float:
        loss = box.forward_process(batch["input"], batch["target"], {})
        box.post_forward_process(loss=loss)
        return float(loss.detach())

    return step


class _Pair(nn.Module):
    """A model in mdistiller's form: logits and a dict of features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.model(image), {}


def mdistiller(models: Models, temperature: float) -> Step:
    """mdistiller's KD distiller, stepped as its trainer does."""
    root = Path(os.environ.get("MDISTILLER", ""))
    if not (root / "mdistiller" / "distillers" / "KD.py").is_file():
        raise ImportError("MDISTILLER names no clone of the repository")
    package = types.ModuleType("mdistiller_distillers")  # the package itself imports much that is not needed
    package.__path__ = [str(root / "mdistiller" / "distillers")]
    sys.modules["mdistiller_distillers"] = package
    found = importlib.import_module("mdistiller_distillers.KD")
    weights = types.SimpleNamespace(CE_WEIGHT=1.0, KD_WEIGHT=1.0)
    config = types.SimpleNamespace(KD=types.SimpleNamespace(TEMPERATURE=temperature, LOSS=weights))
    student, teacher = models()
    distiller = found.KD(_Pair(student), _Pair(teacher), config).train()
    optimizer = _sgd(student)

    def step(batch: Any) -> float:
        optimizer.zero_grad()
        _, losses = distiller(image=batch["input"], target=batch["target"], epoch=1)
        total = sum(each.mean() for each in losses.values())
        total.backward()
        optimizer.step()
        return float(total.detach())

    return step


PEERS: dict[str, Callable[[Models, float], Step]] = {
    "ModelOpt": modelopt,
    "torchdistill": torchdistill,
    "mdistiller": mdistiller,
}


def ways(models: Models, temperature: float, first: Any, expected: float) -> dict[str, Step]:
    """The peers at hand, after one step each on ``first``, whose loss must be ``expected``: else it is no comparison."""
    found = {}
    for name, make in PEERS.items():
        try:
            step = make(models, temperature)
        except ImportError as error:
            print(f"{name}: not measured: {error}")
            continue
        if abs((value := step(first)) - expected) > 1e-4 * abs(expected):
            raise SystemExit(f"{name} computes another loss: {value} instead of {expected}")
        found[name] = step
    return found
