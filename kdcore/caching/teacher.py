"""The stock teacher ``cached``: a teacher that only remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdcore.caching import check
from kdcore.caching.reader import Cache
from kdcore.errors import InputError
from kdcore.kinds import Teacher
from kdcore.types import Batch, Outputs


class CachedTeacher(Teacher):
    """What ``kd cache`` kept of a teacher, in the place of that teacher.

    ``path``: the folder. ``weights``: the digest of the weights that it must have been made with. All other keys
    are those of the teacher that it stands for: each one that is there must be what the cache was made with.
    """

    live = False
    expected_failures: ClassVar = {"runs": "answers only for the samples of a cache that kd cache made"}

    def __init__(self, *, path: str, weights: str | None = None, **teacher: Any) -> None:
        super().__init__()
        self.cache = Cache(Path(path))
        self.weights, self.expected = weights, teacher
        self.skeleton = _Place()
        self.places = {path.removesuffix(".in"): None for path in self.cache.header["taps"]}
        for path in self.places:
            _grow(self.skeleton, path.split("."))

    @property
    def model(self) -> nn.Module:
        return self.skeleton

    def setup(self) -> None:
        """Refuse whatever differs between the cache and the run, with the difference in words."""
        parts = self.run._distiller.parts  # the core's own: what a run is made of is nobody else's affair
        name = next(name for name, each in parts.teachers.items() if each is self)
        if self.run.recipe is not None:
            check.same_teacher(self.cache, self.run.recipe, name, self.expected, self.weights)
        check.same_run(self.cache, self.run, parts, name)
        check.same_losses(self.cache, parts, name)
        check.same_samples(self.cache, self.run.source, parts.views.get(name, {}))
        if self.cache.layout.codec is not None:
            self._check_classes(self.cache.layout.codec.classes, name)

    def on_epoch(self) -> None:
        made = self.cache.header["augmentation"]
        if made is not None and self.run.total_steps > made["steps"]:
            problem = f"the run has {self.run.total_steps} steps, the cache {made['steps']}"
            raise InputError(str(self.cache.folder), problem, hint="its inputs change from step to step")

    def forward(self, batch: Batch) -> Outputs:
        outputs = self.cache.outputs(batch)
        for path in self.places:  # for the taps, which listen to modules
            module: Any = self.skeleton.get_submodule(path)
            module._said = outputs.tensors.get(path)
            module(outputs.tensors.get(f"{path}.in", module._said))
        return outputs

    @torch.no_grad()
    def _check_classes(self, classes: int, name: str) -> None:
        """A top k says nothing of classes beyond its own, and a student with more would not notice."""
        student = self.run.student
        was_training = student.training
        student.eval()
        try:
            sample = self.run.sample
            said = self.run.ask("student", sample.part(sample.streams[0]))
        finally:
            student.train(was_training)
        have = len(said.unembed.weight) if said.logits is None and said.unembed else said["logits"].shape[-1]
        if have != classes:
            problem = f"the student has {have} classes, the cached teacher {classes}"
            raise InputError(f"teacher.{name}", problem, hint="give both the same label list or vocabulary")

    def get_extra_state(self) -> dict[str, str]:
        """What tells runs with different caches apart (``kd compare`` looks at it)."""
        return {"cache": self.cache.identity}

    def set_extra_state(self, state: Any) -> None:
        pass


class _Place(nn.Module):
    """A module of the live teacher that a loss reads: gives back what it said, so that hooks on it are called."""

    _said: Tensor | None = None  # nothing public here: a module of the teacher may have any name

    def forward(self, value: Tensor) -> Tensor:
        return value if self._said is None else self._said


def _grow(place: nn.Module, path: list[str]) -> None:
    """The places along a path of modules."""
    for name in path:
        if name not in place._modules:
            place.add_module(name, _Place())
        place = place.get_submodule(name)
