"""The kinds: what a teacher, student, router, loss, augmentation, stage, probe and exporter must do.

``self.run`` (``kdcore.context.RunContext``) is there from ``setup`` on. Besides the methods below, any
component may have any event of ``kdcore.hookspecs.RunEvents``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from kdcore.errors import InputError
from kdcore.types import Batch, Outputs

if TYPE_CHECKING:
    from kdcore.context import RunContext

Terms = Tensor | dict[str, Tensor]


def frozen(module: nn.Module) -> nn.Module:
    """Freeze in place: no parameter takes gradient, and ``.train()`` leaves it in eval mode.

    Gradient still passes through to the inputs, for components that declare ``grad_through``.
    """
    module.requires_grad_(False)
    return held(module)


def held(module: nn.Module) -> nn.Module:
    """Put in eval mode for good: ``.train()`` leaves it there."""
    module.eval()
    object.__setattr__(module, "train", lambda mode=True: module)
    return module


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode in this block, then the mode that was before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Kind(nn.Module, ABC):
    """What all components have. ``reads``: names of outputs, ``student.NAME`` or ``teacher.NAME``."""

    reads: ClassVar[tuple[str, ...]] = ()
    own_optimizer: ClassVar[Mapping[str, Any] | None] = None
    """The default optimiser (a table with ``use``) of a component that steps its own parameters through
    ``run.update``; a component that leaves it None is trained by the run's optimiser."""
    grad_through: ClassVar[bool] = False
    place: str = ""  # in the recipe, such as "loss.0"
    run: RunContext

    def wants(self) -> tuple[str, ...]:
        """What this instance reads; the default is the class's ``reads``."""
        return self.reads


class Model(Kind):
    """What teachers and students have in common. ``model`` is the module that taps' paths start from."""

    @property
    def model(self) -> nn.Module:
        return self

    @abstractmethod
    def forward(self, batch: Batch) -> Outputs:
        """What the model says of a batch."""

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        """The inference rule: what metrics judge, and what a student's exported graph returns. Nothing without logits."""
        if outputs.logits is not None:
            return {"logits": outputs.logits}
        return {} if outputs.unembed is None else {"logits": outputs.unembed.logits()}


class Teacher(Model):
    """``forward(batch) -> Outputs``, called under ``no_grad`` in eval mode.

    ``saved``: its weights are part of the run's state (it changes, or is made in the run); others are built again
    from the recipe.
    """

    saved: ClassVar[bool] = False
    live: ClassVar[bool] = True
    """Can be asked about any batch, so it is judged beside the student; one from a cache cannot."""

    def trainee(self) -> Student | None:
        """This teacher as a student of its task, for ``train = {...}``; None where it cannot be trained."""
        return None


class Student(Model):
    """The model that is trained and shipped.

    ``training_only``: beginnings of parameter names (auxiliary heads, projectors) that must not be in an
    exported graph; the exporter proves their absence.
    """

    training_only: ClassVar[tuple[str, ...]] = ()
    input_names: tuple[str, ...] = ("input",)
    """The batch's keys that the exported graph takes, in its order."""
    export_batch: tuple[int, int] = (1, 64)
    """The fewest and the most samples that the exported graph takes in a call."""

    def task_loss(self, outputs: Outputs, batch: Batch) -> Terms | None:
        """[B], [B,L] or named terms; None leaves it to the recipe's task."""
        return None

    def supervised(self, batch: Batch) -> Tensor | None:
        """Bool, of the target's shape: the positions that count, known before any forward; None: the samples do."""
        if "mask" in batch:
            return cast(Tensor, batch["mask"]).bool()
        target = batch.get("target")
        return target != -100 if isinstance(target, Tensor) and target.dim() > 1 else None

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        if not (found := super().infer(outputs)):
            problem = f"{type(self).__name__} gives no logits, so it needs infer() of its own"
            raise InputError("student", problem)
        return found

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the exported graph takes, by name; the default is the batch's ``input_names``."""
        if absent := [name for name in self.input_names if name not in batch]:
            hint = f"set input_names, or write inputs(batch), in {type(self).__name__}"
            problem = "the batch has not what the graph takes"
            raise InputError("student.input_names", problem, given=absent, allowed=list(batch), hint=hint)
        return {name: batch[name] for name in self.input_names}

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        """Shapes of the graph's inputs, with names for the axes that may vary, and each such axis's range."""
        shapes = {name: ("batch", *value.shape[1:]) for name, value in inputs.items()}
        return shapes, {"batch": self.export_batch}

    def host(self, batch: Batch) -> tuple[str, dict[str, Any]] | None:
        """Work around the graph (voxels, box decoding) that ships as Python: the file's text, and what its
        ``preprocess`` is given of a batch, by name (arrays, or lists of arrays), in place of the data's own
        preprocessing. None: the graph is all.

        With ``postprocess``, ``deploy``'s module gives what that takes, and ``graph`` says what it must be.
        """
        return None

    def graph(self, outputs: Outputs) -> dict[str, Tensor]:
        """What the exported graph returns of these outputs: the inference rule, unless host code ends it."""
        return self.infer(outputs)

    def deploy(self) -> nn.Module:
        """The module to ship: forward, then ``infer``, with nothing that only training needed."""
        return Deployed(self)

    def parameters_to_ship(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


class Deployed(nn.Module):
    """A student as a plain module: tensors in the order of ``inputs``, a dict of tensors out."""

    def __init__(self, student: Any, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.student = student
        self.names = names or tuple(student.input_names)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        batch = Batch(dict(zip(self.names, tensors, strict=True)))
        outputs = self.student(batch)
        return self.student.infer(outputs) if hasattr(self.student, "infer") else {"logits": outputs.logits}


class Router(Kind):
    """Weights [B,K] over the K teachers, or (weights, terms of its own).

    Works on losses that give one value a sample. Gradient flows into the weights.
    """

    labels_column: ClassVar[bool] = False
    """The weights have one column more, which weighs the task's own term."""
    sums_to_one: ClassVar[bool] = True
    """Each sample's weights, all columns together, sum to 1; the conformance check holds it to that."""

    def plan(self, batch: Batch, student: Outputs) -> Tensor | None:
        """Bool [B,K]: which teachers run on which samples. None: all on all."""
        return None

    @abstractmethod
    def forward(
        self, batch: Batch, student: Outputs, teachers: Mapping[str, Outputs]
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Weights [B,K], of teachers that ran on some rows only, too; terms of its own by name, each [B] or a scalar."""


class Loss(Kind):
    """``forward(student, teacher, batch)`` gives a term or named terms: each [B], [B,L] or a scalar.

    A term [B,L] is a sum over supervised positions divided by their count in the global batch. A loss
    changes its state in its events, never in ``forward``.
    """

    reads: ClassVar[tuple[str, ...]] = ("student.logits", "teacher.logits")
    hard_term: bool = False
    t_squared: bool = True
    zero_at_teacher: bool = False
    couples_batch: bool = False
    mean_over_classes: bool = False
    """Divided by the number of classes; the default is the sum over classes."""
    topk: bool = False
    """Takes ``Outputs.topk`` where a teacher gives that instead of logits."""
    joint: ClassVar[bool] = False
    """Called once with all teachers' outputs by name, instead of once a teacher."""
    all_streams: bool = False
    """Called once with the outputs of all streams by name, instead of once a stream."""

    @abstractmethod
    def forward(self, student: Any, teacher: Any, batch: Batch) -> Terms:
        """``student`` and ``teacher`` are Outputs, or dicts of them (``joint``, ``all_streams``)."""


class Augmentation(Kind):
    """``forward(batch) -> Batch``: decides what data the student (and its teachers) see."""

    changes_inputs: ClassVar[bool] = True
    """A cached teacher is refused beside an augmentation that changes inputs."""
    changes_labels: ClassVar[bool] = False
    """Whether ``target`` (mixed or smoothed labels) or the samples' ids come out different."""
    draw_every: int | None = None
    """The steps that a block of ``draw`` lasts, which is an epoch then; None: as many as the stream has batches."""

    def forward(self, batch: Batch) -> Batch:
        return batch

    def draw(self, size: int, epoch: int) -> Tensor | None:
        """Indices (int64) of the next epoch's samples out of ``size``, in order; None leaves the order.

        Asked once an epoch, at its start; repetitions are allowed. The block is part of the run's state.
        """
        return None


class Stage(ABC):
    """A procedure beyond the standard ``distill``."""

    def view(self, recipe: Any, artefacts: Mapping[str, Any]) -> Any:
        """The recipe as this stage lays it out, a function of the recipe and earlier artefacts alone.

        What is rebuilt from a run folder (the student, the teachers of a probe) is rebuilt from this view.
        """
        return recipe

    @abstractmethod
    def run(self, run: Any) -> dict[str, Any]:
        """Artefacts by name: paths of files, or JSON values. Trains only through ``run.fit``."""


class Probe(ABC):
    """An analysis of trained models."""

    @abstractmethod
    def measure(self, run: Any, models: Mapping[str, nn.Module], data: Any) -> dict[str, Any]:
        """Numbers or JSON values by name; ``models`` are in eval mode, ``data.loader(split)`` gives batches."""


@dataclass
class ExportRequest:
    """What an exporter is given of a run: the module to ship and everything to prove it right with.

    ``samples`` are real held-out samples as the graph takes them, ``raw_samples`` the same as a receiver has
    them; ``rule`` is what the student's own inference says of them, ``metric(outputs, targets)`` judges it.
    ``absent`` are beginnings of parameter names that must not be in the graph. ``host`` is the text of Python
    that ships around the graph; ``rule`` is then what the graph gives, and ``reference_metric`` the metric of the
    student's own inference.
    """

    name: str
    module: nn.Module
    shapes: dict[str, tuple[int | str, ...]]
    axes: dict[str, tuple[int, int]]
    samples: dict[str, Any]
    rule: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    raw_samples: dict[str, Any] | None = None
    preprocessing: Sequence[Mapping[str, Any]] = ()
    labels: Sequence[str] | None = None
    targets: Any = None
    metric: Callable[[dict[str, Any], Any], float] | None = None
    metric_name: str = ""
    higher_is_better: bool = True
    absent: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    host: str | None = None
    reference_metric: float | None = None


class Exporter(ABC):
    """Turns a run's student into an artefact folder, or raises a KDError and leaves nothing there."""

    @abstractmethod
    def export_request(self, request: ExportRequest, out: Path) -> dict[str, Any]:
        """Write the artefact to ``out``; returns rows for the report."""

    def bench(
        self, artefact: Path, student: Any, teacher: Any, *, batches: Sequence[int], threads: int
    ) -> Any:
        """Latency and throughput of an artefact beside the torch modules; ``str()`` of it is the table."""
        problem = f"{type(self).__name__} has no benchmark of its artefacts"
        raise InputError("bench", problem, given=str(artefact))
