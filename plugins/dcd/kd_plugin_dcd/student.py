"""The student of DCD: the teacher's own uni-modal encoders, and some of its fusion layers to start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kdcore import Batch, InputError, Outputs, Student
from kdcore.models import as_outputs, build_module


class LayerCopy(Student):
    """Any pair scorer [B,...], [B,N,...] -> [B,N], whose modules start as copies of the teacher's.

    ``start`` maps module paths of ``model`` to module paths of the teacher ``teacher``; each is copied once, before
    training (the authors' METER student: fusion layers 0, 3 and 5 of 6). Encoders that are to stay the teacher's
    are frozen by ``train`` of the recipe's table. ``inputs`` are batch keys; those named in ``candidates`` have a
    free axis of candidates in an exported graph, up to ``most`` or what the data have.
    """

    def __init__(
        self,
        *,
        model: Callable[..., Any],
        args: dict[str, Any] = {},  # noqa: B006 - read only; the schema shows the default
        inputs: list[str] = ["image", "text"],  # noqa: B006
        candidates: list[str] = ["text"],  # noqa: B006
        most: int = 128,
        start: dict[str, str] = {},  # noqa: B006
        teacher: str = "main",
    ) -> None:
        super().__init__()
        self.module = build_module(model, args, "student")
        self.input_names, self.candidates, self.most = tuple(inputs), candidates, most
        self.start, self.teacher = start, teacher

    @property
    def model(self) -> Any:
        return self.module

    def forward(self, batch: Batch) -> Outputs:
        return as_outputs(self.module(*(batch[name] for name in self.input_names)))

    def setup(self) -> None:
        """Copy the teacher's layers; a student alone, without teachers, starts as it is."""
        if not self.start or not self.run.teachers:
            return
        if self.teacher not in self.run.teachers:
            raise InputError(
                "student.teacher", "no such teacher", given=self.teacher, allowed=self.run.teachers
            )
        source = dict(self.run.teachers[self.teacher].model.named_modules())
        mine = dict(self.module.named_modules())
        for to, from_ in self.start.items():
            for path, modules, whose in ((to, mine, "student"), (from_, source, "teacher")):
                if path not in modules:
                    allowed = [name for name in modules if name]
                    raise InputError(
                        f"student.start.{to}", f"no such module of the {whose}", given=path, allowed=allowed
                    )
            try:
                mine[to].load_state_dict(
                    source[from_].state_dict()
                )  # copies values: the teacher keeps its storage
            except RuntimeError as error:
                raise InputError(f"student.start.{to}", f"does not fit: {error}", given=from_) from None

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.input_names}

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        shapes, axes = super().shapes(inputs)
        listed = [name for name in inputs if name in self.candidates]
        shapes |= {name: ("batch", "candidates", *inputs[name].shape[2:]) for name in listed}
        most = max([self.most, *(inputs[name].shape[1] for name in listed)])
        return shapes, {**axes, "candidates": (1, most)} if listed else axes
