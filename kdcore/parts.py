"""What a run is made of: the student, teachers and components of a recipe, built and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kdcore.kinds import Augmentation, Kind, Loss, Router, Student, Teacher
from kdcore.tables import Ramp
from kdcore.taps import Taps
from kdcore.task import Task


@dataclass
class Slot:
    """A loss with what the recipe says of it. ``reads``: side -> name -> module path (or output name)."""

    name: str
    loss: Loss
    weight: float | Ramp = 1.0
    teachers: tuple[str, ...] = ()
    streams: tuple[str, ...] | None = None
    reads: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def weight_at(self, progress: float) -> float:
        return self.weight.at(progress) if isinstance(self.weight, Ramp) else self.weight


@dataclass
class Parts:
    """What a run is made of, built and checked."""

    student: Student
    task: Task
    teachers: dict[str, Teacher] = field(default_factory=dict)
    router: Router | None = None
    routed: tuple[str, ...] = ()
    augmentations: dict[str, Augmentation] = field(default_factory=dict)
    losses: list[Slot] = field(default_factory=list)
    taps: dict[str, Taps] = field(default_factory=dict)
    needs: dict[str, set[str]] = field(default_factory=dict)
    views: dict[str, Mapping[str, str]] = field(default_factory=dict)
    task_weight: float = 1.0
    task_streams: tuple[str, ...] | None = None
    forward: str = "joint"

    def components(self) -> list[tuple[str, Kind]]:
        """(name, component) in the recipe's order; what a component holds nested follows it, by its path."""
        top: list[tuple[str, Kind]] = [
            ("student", self.student),
            *((f"teacher.{name}", teacher) for name, teacher in self.teachers.items()),
            *([("router", self.router)] if self.router is not None else []),
            *((f"augmentation.{name}", each) for name, each in self.augmentations.items()),
            *((f"loss.{slot.name}", slot.loss) for slot in self.losses),
        ]
        found: dict[int, tuple[str, Kind]] = {}
        for name, each in top:
            for path, module in each.named_modules():
                if isinstance(module, Kind):
                    found.setdefault(id(module), (f"{name}.{path}" if path else name, module))
        return list(found.values())
