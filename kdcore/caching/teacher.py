"""The stock teacher ``cached``: a teacher that only remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from kdcore.caching import check
from kdcore.caching.reader import Cache
from kdcore.errors import InputError
from kdcore.kinds import Teacher, evaluating
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

    def setup(self) -> None:
        """Refuse whatever differs between the cache and the run, with the difference in words."""
        parts = self.run._distiller.parts  # the core's own: what a run is made of is nobody else's affair
        name = next(name for name, each in parts.teachers.items() if each is self)
        recipe, source = self.run.recipe, self.run.source
        assert recipe is not None  # a stage's run has one
        check.same_teacher(self.cache, recipe, name, self.expected, self.weights)
        check.same_run(self.cache, recipe, source, parts, name)
        check.same_losses(self.cache, parts, name)
        check.same_samples(self.cache, source, parts.views.get(name, {}))
        self._check_classes(name)

    def on_epoch(self) -> None:
        made = self.cache.header["augmentation"]
        if made is not None and self.run.total_steps > made["steps"]:
            problem = f"the run has {self.run.total_steps} steps, the cache {made['steps']}"
            raise InputError(str(self.cache.folder), problem, hint="its inputs change from step to step")

    def forward(self, batch: Batch) -> Outputs:
        return self.cache.outputs(batch)

    def _check_classes(self, name: str) -> None:
        """A top k says nothing of classes beyond its own, and a student with more would not notice."""
        if (codec := self.cache.layout.codec) is None:
            return
        student, sample = self.run.student, self.run.sample
        with torch.no_grad(), evaluating(student):
            said = self.run.ask("student", sample.part(sample.streams[0]))
        have = len(said.unembed.weight) if said.logits is None and said.unembed else said["logits"].shape[-1]
        if have != codec.classes:
            problem = f"the student has {have} classes, the cached teacher {codec.classes}"
            raise InputError(f"teacher.{name}", problem, hint="give both the same label list or vocabulary")

    def get_extra_state(self) -> dict[str, str]:
        """What tells runs with different caches apart (``kd compare`` looks at it)."""
        return {"cache": self.cache.identity}

    def set_extra_state(self, state: Any) -> None:
        pass
