"""A live teacher in a prepared run: which batches it is asked about, what it says, and what it reads of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kdcore import building
from kdcore.caching.check import changes_inputs, replayed
from kdcore.caching.keys import Watched
from kdcore.data import Key, Keyed, batch_of
from kdcore.errors import InputError
from kdcore.stages import StageRun, train_teacher
from kdcore.streams import viewed, with_tensors
from kdcore.types import Batch, Outputs


@dataclass(frozen=True)
class Part:
    """The work of a shard: batches of a stream, or (None) steps of the run, of which the last is its dry run."""

    stream: str | None
    places: range


@dataclass
class Said:
    """One answer of the teacher, with what it was asked, and the names of the values that it read."""

    batch: Batch
    outputs: Outputs
    read: set[str]


class Recorder:
    """A live teacher in a prepared run, asked batch by batch. ``sizes`` are the batch sizes, by stream.

    ``trained = False``: as it is before its training, to see what would be refused after it.
    """

    def __init__(self, run: StageRun, name: str, *, trained: bool = True) -> None:
        self.name, self.recipe, self.source, place = name, run.recipe, run.source, f"teacher.{name}"
        learns = trained and name in building.to_train(run.recipe)
        learnt = train_teacher(run, name)[0] if learns else None
        self.parts = building.assemble(run.recipe, run.source, run.builder())
        self.teacher = self.parts.teachers[name]
        if not self.teacher.live or self.teacher.saved:
            use = run.recipe.teacher[name].use
            raise InputError(place, f"{use!r} changes during a run, or is cached already: nothing to keep")
        if learnt is not None:
            self.teacher.load_state_dict(learnt.state_dict())
        self.distiller, self.run = run.context(self.parts)
        train, self.run.steps_per_epoch = run.recipe.train, self.run.order.steps_per_epoch
        self.run.total_steps = train.steps or (train.epochs or 1) * self.run.steps_per_epoch
        if any(each.grad_through for _, each in self.parts.components()):
            raise InputError(place, "a component sends gradient through it: a cache cannot")
        self.needs = self.parts.needs.get(name, set())
        if not self.needs:
            raise InputError(place, "no loss and no router of the recipe reads it")
        self.sizes, self.replayed = run.source.batch_sizes, replayed(self.parts, run.source)
        self._refuse_learning()

    def _refuse_learning(self) -> None:
        """Augmentations whose inputs depend on the training."""
        for name, each in self.parts.augmentations.items():
            events = [
                event for event in ("before_step", "after_step", "on_epoch") if hasattr(type(each), event)
            ]
            if changes_inputs(each) and (each.own_optimizer is not None or events):
                problem = "what it makes of a sample depends on the training: no cache can hold it"
                raise InputError(f"augmentation {name}", problem)

    @torch.no_grad()
    def ask(self, part: Batch) -> Said:
        """What the teacher says, as a step of the run would ask it: precision, view, taps and all."""
        batch, taps = viewed(part, self.parts.views[self.name]), self.parts.taps.get(self.name)
        watched, outputs = Watched(batch), Outputs()
        stop = taps is not None and self.needs <= set(taps.names)
        reading: Any = nullcontext({}) if taps is None else taps.reading(stop=stop)
        precision, dtypes = self.recipe.train.precision, {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.distiller.train()
        with (
            torch.autocast(self.run.device.type, dtypes.get(precision), precision in dtypes),
            reading as seen,
        ):
            outputs = self.teacher(watched)
        return Said(batch, with_tensors(outputs, seen), watched.read - {"id"})

    def work(self, together: int) -> list[Part]:
        """All there is to ask, in parts of so many batches: samples that never change are asked about once."""
        streams = ((name, len(data)) for name, data in self.source.streams.items())
        once = ((name, -(-count // self.sizes[name])) for name, count in streams if name not in self.replayed)
        counts: dict[str | None, int] = dict(once)
        if self.replayed:
            counts[None] = self.run.total_steps + 1
        spans = ((name, range(count)) for name, count in counts.items())
        return [Part(name, span[n : n + together]) for name, span in spans for n in span[::together]]

    def batches(self, part: Part) -> Iterator[Batch]:
        """A part's batches, of one stream each, on the device."""
        for place in part.places:
            if part.stream is None:
                yield from self._step(place)
            else:
                data, size = self.source.streams[part.stream], self.sizes[part.stream]
                places = range(len(data))[place * size : (place + 1) * size]
                keys = [Key(part.stream, 0, each) for each in places]
                yield batch_of(data, keys).to(self.run.device)

    def _step(self, step: int) -> list[Batch]:
        """What the run sees in a step; in its dry run, a few samples as they are and as they are augmented."""
        run, dry = self.run, step == self.run.total_steps
        self.distiller.train(not dry)
        run.step = 0 if dry else step
        if dry:
            run.reseed("dry run")
            batch = run.sample
        else:
            run.order.begin_epoch(run.epoch)
            run.reseed("step", step, shared=False)
            keys = run.order.keys(step)
            batch = Keyed(self.source.streams, self.source.seed).batch(keys).to(run.device)
        seen = [batch.copy()] if dry else []
        for augmentation in self.parts.augmentations.values():
            batch = augmentation(batch)
        names = batch.streams if batch.parts else self.replayed
        return [each.part(name) for each in [*seen, batch] for name in names if name in self.replayed]
