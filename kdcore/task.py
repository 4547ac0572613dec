"""Tasks: the hard loss on labels, and the metrics (torchmetrics, by name) that judge the inference rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.errors import InputError, nearest
from kdcore.tables import TaskTable
from kdcore.types import Batch, Outputs

DEFAULT_METRICS = {
    "classification": ["accuracy"],
    "segmentation": ["jaccard_index"],
    "language": ["perplexity", "accuracy"],
    "regression": ["mean_squared_error"],
    "none": [],
}
LOWER_IS_BETTER = ("error", "perplexity", "loss", "distance", "calibration")


def higher_is_better(metric: str) -> bool:
    return not any(word in metric for word in LOWER_IS_BETTER)


class Task:
    """The loss on labels and the metrics of a recipe's ``[task]``."""

    def __init__(self, table: TaskTable, classes: int | None) -> None:
        self.table, self.classes = table, classes
        self.metrics = DEFAULT_METRICS[table.use] if table.metrics is None else table.metrics
        for name in self.metrics:
            _metric_class(name)

    def terms(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """Cross-entropy ([B], [B,L] or [B] averaged over pixels) or squared error [B]; None without labels."""
        target = outputs.target if outputs.target is not None else batch.get("target")
        if self.table.use == "none" or target is None or outputs.logits is None:
            return None
        logits = outputs.logits.float()
        if self.table.use == "regression":
            return (logits - target.float()).square().reshape(len(logits), -1).mean(-1)
        classes_at = 1 if self.table.use in ("classification", "segmentation") else -1
        loss = F.cross_entropy(
            logits.movedim(classes_at, 1),
            target,
            reduction="none",
            label_smoothing=self.table.label_smoothing,
            ignore_index=-100,
        )
        return loss.flatten(1).mean(-1) if self.table.use == "segmentation" else loss

    def meter(self) -> Meter:
        return Meter(self)


class Meter:
    """The task's metrics over an evaluation: ``update`` with each batch, ``compute`` once."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._metrics = {name: self._make(name) for name in task.metrics}
        self.count = 0

    def _make(self, name: str) -> Any:
        kind = _metric_class(name)
        if self.task.table.use == "regression" or name == "perplexity":
            return kind(ignore_index=-100) if name == "perplexity" else kind()
        if not self.task.classes:
            raise InputError("data.source", f"metric {name!r} needs the number of classes", hint="set Data.classes")
        options: dict[str, Any] = {"task": "multiclass", "num_classes": self.task.classes}
        if name == "accuracy":
            options["average"] = "micro"
        if name in ("accuracy", "jaccard_index"):
            options["ignore_index"] = -100
        return kind(**options)

    def update(self, inferred: Mapping[str, Tensor], outputs: Outputs, batch: Batch) -> None:
        target = outputs.target if outputs.target is not None else batch.get("target")
        if target is None:
            return
        prediction = inferred.get("logits", inferred.get("probabilities", next(iter(inferred.values()))))
        prediction, target = prediction.detach().float().cpu(), target.cpu()
        self.count += len(target)
        for name, metric in self._metrics.items():
            if prediction.dim() == 3 and name == "perplexity":
                metric.update(prediction, target)
            elif prediction.dim() == 3:
                metric.update(prediction.flatten(0, 1), target.flatten())
            else:
                metric.update(prediction, target)

    def compute(self) -> dict[str, float]:
        if not self.count:
            return {}
        return {name: float(metric.compute()) for name, metric in self._metrics.items()}


def _metric_class(name: str) -> Any:
    import torchmetrics
    from torchmetrics.text import Perplexity

    classes = {_snake(n): getattr(torchmetrics, n) for n in torchmetrics.__all__ if n[0].isupper()}
    classes["perplexity"] = Perplexity
    if name not in classes:
        raise InputError(
            "task.metrics", "no such metric in torchmetrics", given=name, hint=nearest(name, classes) or "its snake_case name"
        )
    return classes[name]


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


def check_alignment(student: Outputs, teacher: Outputs, place: str) -> None:
    """Class counts agree before anything is trained."""
    if student.logits is None or teacher.logits is None:
        return
    mine, theirs = _classes(student.logits), _classes(teacher.logits)
    if mine != theirs:
        raise InputError(
            place,
            f"the teacher has {theirs} classes, the student {mine}",
            hint="give both the same label list or vocabulary",
        )


def _classes(logits: Tensor) -> int:
    return logits.shape[1] if logits.dim() in (2, 4) else logits.shape[-1]


@torch.no_grad()
def evaluate(model: Any, loader: Any, task: Task, device: torch.device) -> dict[str, float]:
    """The metrics of ``model.infer(model(batch))`` over a loader, in eval mode, which is put back."""
    was_training = model.training
    model.eval()
    meter = task.meter()
    for batch in loader:
        batch = batch.to(device)
        outputs = model(batch)
        inferred = model.infer(outputs) if hasattr(model, "infer") else {"logits": outputs.logits}
        meter.update(inferred, outputs, batch)
    model.train(was_training)
    return meter.compute()
