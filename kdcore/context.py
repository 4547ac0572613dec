"""``self.run``: what a component may know and ask while a run goes on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcore import parallel
from kdcore.data import Keyed, Source
from kdcore.errors import InputError
from kdcore.kinds import Kind, Loss, evaluating
from kdcore.order import key_seed, shard
from kdcore.taps import Replace
from kdcore.terms import Heard
from kdcore.types import Batch, Outputs

if TYPE_CHECKING:
    from kdcore.distill import Distiller
    from kdcore.tables import Recipe


class RunContext:
    """The state of a run as its components see it. Plain object, no module; set before ``setup``.

    ``step`` counts optimiser updates; ``progress`` goes from 0 to 1. ``state`` is a dict for small values
    that must survive a checkpoint; ``artefacts`` are those of earlier stages.
    """

    def __init__(
        self, distiller: Distiller, source: Source, *, seed: int, folder: Path, artefacts: Mapping[str, Any]
    ) -> None:
        self._distiller, self.source, self.seed, self.folder = distiller, source, seed, folder
        self.student, self.teachers = distiller.student, distiller.teachers
        # the teachers of the router's columns, in their order; all teachers where the run has no router
        self.routed: tuple[str, ...] = distiller.parts.routed or tuple(distiller.teachers)
        self.artefacts, self.state = dict(artefacts), {}  # type: dict[str, Any], dict[str, Any]
        self.step, self.total_steps, self.steps_per_epoch = 0, 1, 1
        self.device = torch.device("cpu")
        self.order = source.order()
        self.positions: dict[str, int] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.log: Callable[..., None] = lambda **values: None
        self.recipe: Recipe | None = None  # as the stage lays it out; None outside a stage
        self.terms: Mapping[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RunContext:
        return self  # copies of a model belong to the same run

    @property
    def sample(self) -> Batch:
        """A small real batch, for shapes: setup may ask the models about it."""
        return self.source.sample().to(self.device)

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def progress(self) -> float:
        return min(self.step / max(self.total_steps, 1), 1.0)

    def data(self, split: str) -> Iterator[Batch]:
        """The batches of ``train``, ``tune`` or ``val``, on the device, in order. ``test`` is refused."""
        if split == "test":
            raise PermissionError("a component may not read the test split: it is read once, at the end")
        return (batch.to(self.device) for batch in self.source.loader(split))

    def stream(self, name: str) -> Batch:
        """The next batch of a training stream of its own position: endless, and part of the checkpoint."""
        first, count = self.positions.get(name, 0), self.source.batch_sizes[name]
        self.positions[name] = first + count
        keys = shard(self.order.cycled(name, first, count), parallel.rank(), parallel.world())
        return Keyed({name: self.source.streams[name]}, self.seed).batch(keys).to(self.device)

    def ask(self, name: str, batch: Batch, grad: bool = False, replace: Replace | None = None) -> Outputs:
        """What the student (``"student"``) or a teacher says of any batch; taps belong to this call.

        ``grad`` lets gradient pass through a teacher to its inputs; the student always has it.
        """
        return self._distiller.ask(name, batch, grad, replace)

    @torch.no_grad()
    def preview(self, loss: Loss) -> tuple[Outputs, Any]:
        """What ``loss.forward`` will be given as student and teacher for the small sample: for shapes, in ``setup``.

        The models are asked in eval mode and are left as they were. A loss that is called once a teacher can
        make modules for one teacher only: several are an InputError.
        """
        ask, parts = self._distiller.ask, self._distiller.parts
        slot = next(slot for slot in parts.losses if slot.loss is loss)
        if len(slot.teachers) > 1 and not loss.joint:
            hint = 'a [[loss]] each, with teacher = "NAME"'
            raise InputError(
                f"loss {slot.name}", "fits itself to one teacher", given=slot.teachers, hint=hint
            )
        part = self.sample.part((slot.streams or self.sample.streams)[0])
        with evaluating(self._distiller):
            said = {name: ask(name, part) for name in slot.teachers}
            heard = self._distiller.read(Heard("", part, ask("student", part), said), slot)
        return heard.student, heard.teachers if loss.joint else next(iter(heard.teachers.values()), None)

    def update(self, component: Kind, loss: Tensor, clip: float | None = None) -> None:
        """One step of a component's own optimiser on ``loss``; no other parameter gets a gradient from it."""
        optimizer = self.optimizers[self._distiller.name_of(component)]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        parallel.average_gradients(params)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def objective(self, batch: Batch, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """The step's own objective on any batch, as a function of the student's parameters (differentiable).

        ``params`` maps names of ``run.student.named_parameters()`` to tensors that stand in for them.
        """
        swapped = {f"student.{name}": value for name, value in (params or {}).items()}
        total: Tensor = torch.func.functional_call(self._distiller, swapped, (batch,))
        return total

    def task_terms(self, outputs: Outputs, batch: Batch) -> Any:
        """The task's hard loss of these outputs: the student's own, or else the recipe's task's."""
        return self._distiller.hard_terms(outputs, batch)

    def value_of(self, component: Kind) -> float:
        """The value that a loss's terms had in the last step, over the global batch, before its weight."""
        slot = self._distiller.name_of(component).partition(".")[2]
        mine = [v for name, v in self.terms.items() if name == slot or name.startswith(f"{slot}.")]
        return parallel.total(sum(float(value) for value in mine), self.device)

    def rng(self, key: str, *, shared: bool = True) -> torch.Generator:
        """A CPU generator keyed by (seed, step, key); equal on all ranks unless ``shared`` is False."""
        rank = 0 if shared else parallel.rank() + 1
        return torch.Generator().manual_seed(key_seed(self.seed, "rng", self.step, key, rank))

    @property
    def generator(self) -> torch.Generator:
        """This step's generator, of this rank."""
        return self.rng("generator", shared=False)

    @property
    def shared_generator(self) -> torch.Generator:
        """This step's generator, the same on all ranks."""
        return self.rng("generator")

    def reseed(self, *what: Any, shared: bool = True) -> None:
        """Make torch's, numpy's and Python's global generators a function of (seed, what), or of the rank, too.

        Called at every step, so what dropout and third-party code draw does not depend on what ran before.
        """
        seed = key_seed(self.seed, *what, 0 if shared else parallel.rank())
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also queues calls for absent devices
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def state_dict(self) -> dict[str, Any]:
        optimizers = {name: each.state_dict() for name, each in self.optimizers.items()}
        known = {"step": self.step, "state": self.state, "positions": self.positions}
        return {**known, "drawn": self.order.drawn, "optimizers": optimizers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.state, self.positions = state["step"], dict(state["state"]), dict(state["positions"])
        self.order.drawn = dict(state["drawn"])
        for name, value in state["optimizers"].items():
            self.optimizers[name].load_state_dict(value)
