"""Teachers and students of the core's stock: any torch module, and the student as its own teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcore.checkpoint import load_weights
from kdcore.errors import InputError, blame
from kdcore.kinds import Kind, Student, Teacher, evaluating
from kdcore.signature import import_string, schema_of
from kdcore.types import Batch, Outputs


def build_module(model: Callable[..., Any] | str, args: dict[str, Any], place: str = "model") -> nn.Module:
    """The module that a callable returns for ``args``, which are checked against its signature."""
    function = import_string(model, f"{place}.model") if isinstance(model, str) else model
    name = getattr(function, "__name__", str(model))
    checked = schema_of(function, name).validate(args, f"{place}.args")
    with blame(f"{place}.args", f"{name} refused its arguments", given=args):
        module = function(**checked)
    if not isinstance(module, nn.Module):
        given = type(module).__name__
        raise InputError(f"{place}.model", f"{name} does not return a torch.nn.Module", given=given)
    return module


class _Wrapped(Kind):
    """What a student and a teacher that wrap any torch module have in common.

    The module is called with the batch's ``inputs``; it gives a tensor, a dict of tensors or Outputs.
    """

    input_names: tuple[str, ...]

    def __init__(
        self,
        *,
        model: Callable[..., Any],
        args: dict[str, Any] = {},  # noqa: B006 - read only; the schema shows the default
        inputs: list[str] = ["input"],  # noqa: B006
        checkpoint: Annotated[str, Field(min_length=1)] | None = None,
    ) -> None:
        super().__init__()
        kind = "student" if isinstance(self, Student) else "teacher"
        self.module = build_module(model, args, kind)
        self.input_names = tuple(inputs)
        self.has_weights = bool(checkpoint)
        if checkpoint:
            load_weights(self.module, checkpoint, f"{kind}.checkpoint")

    @property
    def model(self) -> nn.Module:
        return self.module

    def forward(self, batch: Batch) -> Outputs:
        return as_outputs(self.module(*(batch[name] for name in self.input_names)))


class ModuleStudent(_Wrapped, Student):
    """A torch module as a student: called with the batch's ``inputs``; gives a tensor, a dict or Outputs.

    ``export_batch``: the fewest and the most samples that the exported graph takes in a call.
    """

    def __init__(
        self,
        *,
        model: Callable[..., Any],
        args: dict[str, Any] = {},  # noqa: B006
        inputs: list[str] = ["input"],  # noqa: B006
        checkpoint: str | None = None,
        export_batch: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = (1, 64),
    ) -> None:
        super().__init__(model=model, args=args, inputs=inputs, checkpoint=checkpoint)
        if export_batch[0] > export_batch[1]:
            raise InputError("student.export_batch", "the fewest are more than the most", given=export_batch)
        self.export_batch = export_batch

    def parameters_to_ship(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())


class ModuleTeacher(_Wrapped, Teacher):
    """A torch module as a teacher, from ``checkpoint``, or trained by the recipe's ``train`` table."""

    def trainee(self) -> Student:
        return ModuleStudent(model=lambda: self.module, inputs=list(self.input_names))


class SelfTeacher(Teacher):
    """The student as its own teacher: its ``initial`` weights, their ``ema``, or the ``current`` ones.

    EMA: w <- decay * w + (1 - decay) * student after every step, buffers copied; part of the checkpoint.
    """

    saved = True

    def __init__(
        self,
        *,
        weights: Literal["initial", "ema", "current"] = "ema",
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.999,
    ) -> None:
        super().__init__()
        self.weights, self.decay = weights, decay
        self.copy: Student | None = None

    @property
    def model(self) -> nn.Module:
        return self.run.student.model if self.copy is None else self.copy.model

    def setup(self) -> None:
        if self.weights != "current" and self.copy is None:
            self.copy = copy.deepcopy(self.run.student)

    def forward(self, batch: Batch) -> Outputs:
        if self.copy is not None:
            return self.copy(batch)  # type: ignore[no-any-return]
        with evaluating(self.run.student):
            return self.run.student(batch)  # type: ignore[no-any-return]

    @torch.no_grad()
    def after_step(self) -> None:
        if self.weights != "ema" or self.copy is None:
            return
        student = self.run.student
        for mine, theirs in zip(self.copy.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs.detach().to(mine.dtype), 1 - self.decay)
        for kept, current in zip(self.copy.buffers(), student.buffers(), strict=True):
            kept.copy_(current)


def as_outputs(result: Any) -> Outputs:
    """A model's answer as Outputs: a tensor is logits; of a mapping, known names are fields."""
    if isinstance(result, Outputs):
        return result
    if isinstance(result, Tensor):
        return Outputs(logits=result)
    if isinstance(result, Mapping):
        known = {key: result[key] for key in ("logits", "mask", "target", "unembed", "topk") if key in result}
        others = {key: v for key, v in result.items() if key not in known and isinstance(v, Tensor)}
        return Outputs(**known, tensors=others)
    allowed = "a tensor (logits), a dict of tensors, or kdcore.Outputs"
    raise InputError("student", f"the model returned {type(result).__name__}", allowed=allowed)
