"""Tasks: the hard loss on labels, and the metrics (torchmetrics, by name) that judge the inference rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic.alias_generators import to_snake
from torch import Tensor

from kdcore.counts import Counts
from kdcore.errors import InputError, nearest
from kdcore.kinds import Student, Terms, evaluating
from kdcore.signature import import_string
from kdcore.streams import aligned, viewed
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
OPTIONS: dict[str, dict[str, Any]] = {
    "accuracy": {"average": "micro", "ignore_index": -100},
    "jaccard_index": {"ignore_index": -100},
    "perplexity": {"ignore_index": -100},
}
CLASSES = ("classification", "language", "segmentation")  # tasks whose targets are class indices
Loader = Iterable[Batch]
Answer = tuple[Batch, Outputs]
View = Mapping[str, str] | None
LOSS = "loss"  # the metric that is the task's own loss, the student's where it has one
LOWER_IS_BETTER = ("error", "perplexity", "loss", "distance", "calibration")
SHARES = ("accuracy", "jaccard", "f1", "auroc", "precision", "recall", "calibration", "dice", "specificity")


def higher_is_better(metric: str) -> bool:
    """By torchmetrics' names; a metric by import string says it itself (torchmetrics' ``higher_is_better``)."""
    if ":" in metric:
        return getattr(_metric_class(metric), "higher_is_better", None) is not False
    return not any(word in metric for word in LOWER_IS_BETTER)


def is_share(metric: str) -> bool:
    """Whether it lies between 0 and 1: by torchmetrics' bounds, and by its words where torchmetrics has no such metric."""
    import torchmetrics

    try:
        kind = _metric_class(metric)
    except InputError:  # a number that a probe or a demonstration measured
        return any(word in metric for word in SHARES)
    kind = getattr(torchmetrics.classification, f"Multiclass{kind.__name__}", kind)
    return (kind.plot_lower_bound, kind.plot_upper_bound) == (0, 1) and "loss" not in metric


class Task:
    """The loss on labels and the metrics of a recipe's ``[task]``."""

    def __init__(self, table: TaskTable, classes: int | None) -> None:
        self.table, self.classes = table, classes
        self.metrics = DEFAULT_METRICS[table.use] if table.metrics is None else table.metrics
        if twice := sorted({name for name in self.metrics if self.metrics.count(name) > 1}):
            raise InputError("task.metrics", "named twice", given=twice)
        for name in self.metrics:
            if name != LOSS:
                _metric_class(name)

    def terms(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """Cross-entropy ([B], [B,L] with 0 where the target is -100, or [B] averaged over pixels) or squared error [B].

        None without labels. Of tokens whose output layer the model keeps apart, it is computed in chunks.
        """
        target, logits, apart = target_of(outputs, batch), outputs.logits, outputs.unembed
        if self.table.use in ("own", "none") or target is None:
            return None
        if self.table.use == "language" and logits is None and apart is not None:
            from kdcore.functional import chunked

            return chunked(self._cross_entropy, apart, (), target != -100, per_token={"target": target})
        logits = apart.logits() if logits is None and apart is not None else logits
        if logits is None:
            return None
        if self.table.use == "language":
            return self._cross_entropy(logits.flatten(0, -2), target=target.flatten()).view_as(target)
        if self.table.use == "regression":
            return (logits.float() - target.float()).square().reshape(len(logits), -1).mean(-1)
        loss = self._cross_entropy(logits, target=target)
        return loss.flatten(1).mean(-1) if self.table.use == "segmentation" else loss

    def _cross_entropy(self, logits: Tensor, *, target: Tensor) -> Tensor:
        logits, smoothing = logits.float(), self.table.label_smoothing
        options: Any = {"ignore_index": -100, "reduction": "none", "label_smoothing": smoothing}
        try:
            return F.cross_entropy(logits, target, **options)
        except (IndexError, RuntimeError, ValueError):
            self.check_target(target, min(logits.shape[1], self.classes or logits.shape[1]))
            raise

    def check_target(self, target: Tensor, classes: int) -> None:
        """InputError where the targets of a task on classes are no class indices."""
        valid = target[target != -100]
        outside = valid.numel() and not 0 <= valid.min() <= valid.max() < classes
        if self.table.use in CLASSES and (outside or target.dtype != torch.int64):
            given = f"{target.dtype}, {valid.min().item()} to {valid.max().item()}"
            allowed = f"class indices: torch.int64, 0 to {classes - 1}, or -100 (ignored)"
            problem = "'target' is no class index"
            raise InputError("data.source", problem, given=given, allowed=allowed) from None

    def meter(self) -> Meter:
        return Meter(self)


class Meter:
    """The task's metrics over an evaluation: ``update`` with each batch, ``compute`` once.

    ``classes`` and ``targets`` are the predicted and the true ones, batch by batch, where the task is classification.
    """

    def __init__(self, task: Task) -> None:
        self.task, self._loss, self._rows = task, 0.0, 0
        self.classes: list[Tensor] = []
        self.targets: list[Tensor] = []
        # a language model's classes are its vocabulary, which its first logits tell
        self._metrics = {} if task.table.use == "language" else self._made(task.classes)

    def _made(self, classes: int | None) -> dict[str, Any]:
        return {name: self._make(name, classes) for name in self.task.metrics if name != LOSS}

    def _make(self, name: str, classes: int | None) -> Any:
        kind, options, use = _metric_class(name), OPTIONS.get(name, {}), self.task.table.use
        wanted, other = ("classification", "regression")[:: -1 if use == "regression" else 1]
        if kind.__module__.startswith(f"torchmetrics.{other}."):
            hint = f"one of torchmetrics.{wanted}, in snake_case"
            raise InputError("task.metrics", f"task.use = {use!r} has no such metric", given=name, hint=hint)
        if ":" in name or name == "perplexity" or use == "regression":
            return kind(**options)
        if not classes:
            problem = f"metric {name!r} needs the number of classes"
            raise InputError("data.source", problem, hint="set Data.classes")
        return kind(task="multiclass", num_classes=classes, **options)

    def update(self, inferred: Mapping[str, Tensor], outputs: Outputs, batch: Batch) -> None:
        """Of what a model infers its logits, probabilities, or the first that there is; nothing is judged as nothing."""
        if not inferred:
            return
        first, target = next(iter(inferred.values())), target_of(outputs, batch)
        prediction = inferred.get("logits", inferred.get("probabilities", first)).detach().float().cpu()
        if self.task.table.use == "classification":
            self.classes.append(prediction.argmax(1))
        if target is None:
            return
        target = target.cpu()
        if self.task.table.use == "classification":
            self.targets.append(target)
        if self.task.table.use == "language":
            self._metrics = self._metrics or self._made(prediction.shape[-1])
            prediction, target = prediction[target != -100], target[target != -100]
        if self._metrics and not any(":" in name for name in self._metrics):  # anybody's own may take others
            self.task.check_target(target, self.task.classes or prediction.shape[-1])
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
        found = {name: float(each.compute()) for name, each in self._metrics.items() if each.update_called}
        if self._rows:
            found[LOSS] = self._loss / self._rows
        return {name: found[name] for name in self.task.metrics if name in found}

    def majority(self) -> float | None:
        """The accuracy of naming the most frequent class always; None where nothing was classified."""
        labelled = torch.cat(self.targets) if self.targets else torch.tensor([])
        labelled = labelled[labelled >= 0]
        return float(labelled.unique(return_counts=True)[1].max()) / len(labelled) if len(labelled) else None


def _metric_class(name: str) -> Any:
    """A class of torchmetrics by its snake_case name, or anybody's by its import string."""
    import torchmetrics
    from torchmetrics.text import Perplexity

    if ":" in name:
        found = import_string(name, "task.metrics")
        if not (isinstance(found, type) and issubclass(found, torchmetrics.Metric)):
            raise InputError("task.metrics", "is no torchmetrics.Metric", given=name)
        return found
    classes = {to_snake(n): getattr(torchmetrics, n) for n in torchmetrics.__all__ if n[0].isupper()}
    classes["perplexity"] = Perplexity
    if name not in classes:
        hint = nearest(name, classes) or "snake_case"
        raise InputError("task.metrics", "no such metric in torchmetrics", given=name, hint=hint)
    return classes[name]


def target_of(outputs: Outputs, batch: Batch) -> Tensor | None:
    """The labels of a batch as its outputs are aligned with them."""
    return outputs.target if outputs.target is not None else batch.get("target")


@torch.no_grad()
def answers(model: Any, loader: Loader, device: torch.device, view: View = None) -> Iterator[Answer]:
    """Each batch of a loader with what the model, behind its view, says of it in eval mode."""
    with evaluating(model):
        for batch in loader:
            batch = batch.to(device)
            mine = viewed(batch, view)
            yield batch, aligned(model(mine), mine, view)


@torch.no_grad()
def judge(model: Any, loader: Loader, task: Task, device: torch.device, view: View = None) -> Meter:
    """The task's meter over what ``model`` infers; empty of a teacher that infers nothing."""
    meter = task.meter()
    for batch, outputs in answers(model, loader, device, view):
        meter.update(model.infer(outputs), outputs, batch)
        if LOSS in task.metrics:
            own = model.task_loss(outputs, batch) if isinstance(model, Student) else None
            terms = task.terms(outputs, batch) if own is None else own
            if terms is not None:
                meter.add_loss(terms, outputs, batch)
    return meter
