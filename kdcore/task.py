"""Tasks: the hard loss on labels, and the metrics (torchmetrics, by name) that judge the inference rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.counts import Counts
from kdcore.errors import InputError, nearest
from kdcore.kinds import Terms
from kdcore.signature import import_string
from kdcore.tables import TaskTable
from kdcore.types import Batch, Outputs

DEFAULT_METRICS = {
    "classification": ["accuracy"],
    "segmentation": ["jaccard_index"],
    "language": ["perplexity", "accuracy"],
    "regression": ["mean_squared_error"],
    "own": ["loss"],
    "none": [],
}
LOSS = "loss"  # the metric that is the task's own loss, the student's where it has one
LOWER_IS_BETTER = ("error", "perplexity", "loss", "distance", "calibration")


def higher_is_better(metric: str) -> bool:
    """By torchmetrics' names; a metric by import string says it itself (torchmetrics' ``higher_is_better``)."""
    if ":" in metric:
        return getattr(_metric_class(metric), "higher_is_better", None) is not False
    return not any(word in metric for word in LOWER_IS_BETTER)


class Task:
    """The loss on labels and the metrics of a recipe's ``[task]``."""

    def __init__(self, table: TaskTable, classes: int | None) -> None:
        self.table, self.classes = table, classes
        self.metrics = DEFAULT_METRICS[table.use] if table.metrics is None else table.metrics
        for name in self.metrics:
            if name != LOSS:
                _metric_class(name)

    def terms(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """Cross-entropy ([B], [B,L] or [B] averaged over pixels) or squared error [B]; None without labels."""
        target = outputs.target if outputs.target is not None else batch.get("target")
        if self.table.use in ("own", "none") or target is None:
            return None
        if self.table.use == "language":
            return self._tokens(outputs, target)
        if outputs.logits is None:
            return None
        logits = outputs.logits.float()
        if self.table.use == "regression":
            return (logits - target.float()).square().reshape(len(logits), -1).mean(-1)
        loss = self._cross_entropy(logits, target=target)
        return loss.flatten(1).mean(-1) if self.table.use == "segmentation" else loss

    def _tokens(self, outputs: Outputs, target: Tensor) -> Tensor | None:
        """[B,L], 0 where the target is -100; in chunks where the model keeps its output layer apart."""
        if outputs.logits is not None:
            return self._cross_entropy(outputs.logits.flatten(0, -2), target=target.flatten()).view_as(target)
        if outputs.unembed is None:
            return None
        from kdcore.functional import chunked

        return chunked(self._cross_entropy, outputs.unembed, (), target != -100, per_token={"target": target})

    def _cross_entropy(self, logits: Tensor, *, target: Tensor) -> Tensor:
        smoothing = self.table.label_smoothing
        return F.cross_entropy(
            logits.float(), target, reduction="none", label_smoothing=smoothing, ignore_index=-100
        )

    def meter(self) -> Meter:
        return Meter(self)


class Meter:
    """The task's metrics over an evaluation: ``update`` with each batch, ``compute`` once."""

    def __init__(self, task: Task) -> None:
        self.task, self.count, self._loss, self._rows = task, 0, 0.0, 0
        # a language model's classes are its vocabulary, which its first logits tell
        self._metrics = {} if task.table.use == "language" else self._made(task.classes)

    def _made(self, classes: int | None) -> dict[str, Any]:
        return {name: self._make(name, classes) for name in self.task.metrics if name != LOSS}

    def _make(self, name: str, classes: int | None) -> Any:
        kind = _metric_class(name)
        if ":" in name or self.task.table.use == "regression" or name == "perplexity":
            return kind(ignore_index=-100) if name == "perplexity" else kind()
        if not classes:
            raise InputError(
                "data.source", f"metric {name!r} needs the number of classes", hint="set Data.classes"
            )
        options: dict[str, Any] = {"task": "multiclass", "num_classes": classes}
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
        if self.task.table.use == "language":
            self._metrics = self._metrics or self._made(prediction.shape[-1])
            prediction, target = prediction[target != -100], target[target != -100]
        for name, metric in self._metrics.items():
            if name == "perplexity":  # wants [B,L,V] and [B,L]
                metric.update(prediction[None], target[None])
            else:
                metric.update(prediction, target)

    def add_loss(self, terms: Terms, outputs: Outputs, batch: Batch) -> None:
        """The sum of a batch's terms, each a mean over samples or supervised positions."""
        named = terms.values() if isinstance(terms, dict) else [terms]
        self._loss += len(batch) * sum(float(Counts().share(term, "main", outputs, batch)) for term in named)
        self._rows += len(batch)

    def compute(self) -> dict[str, float]:
        """By name, in the task's order; without labels there is nothing to say."""
        found = (
            {name: float(metric.compute()) for name, metric in self._metrics.items()} if self.count else {}
        )
        if self._rows:
            found[LOSS] = self._loss / self._rows
        return {name: found[name] for name in self.task.metrics if name in found}


def _metric_class(name: str) -> Any:
    """A class of torchmetrics by its snake_case name, or anybody's by its import string."""
    import torchmetrics
    from torchmetrics.text import Perplexity

    if ":" in name:
        found = import_string(name, "task.metrics")
        if not (isinstance(found, type) and issubclass(found, torchmetrics.Metric)):
            raise InputError("task.metrics", "is no torchmetrics.Metric", given=name)
        return found
    classes = {_snake(n): getattr(torchmetrics, n) for n in torchmetrics.__all__ if n[0].isupper()}
    classes["perplexity"] = Perplexity
    if name not in classes:
        raise InputError(
            "task.metrics",
            "no such metric in torchmetrics",
            given=name,
            hint=nearest(name, classes) or "snake_case",
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
        if LOSS in task.metrics:
            own = model.task_loss(outputs, batch) if hasattr(model, "task_loss") else None
            terms = task.terms(outputs, batch) if own is None else own
            if terms is not None:
                meter.add_loss(terms, outputs, batch)
    model.train(was_training)
    return meter.compute()
