"""A plain function as a loss: its tensors by name, in chunks where the output layers are apart, or from a top k."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from kdcore.errors import InputError
from kdcore.kinds import Loss, Terms
from kdcore.types import CONVENTIONS, Batch, Outputs, TopK

LOGITS = ("student_logits", "teacher_logits")


class FunctionLoss(Loss):
    """A plain function as a loss: positional arguments are tensors, bound by name.

    ``student_NAME`` and ``teacher_NAME`` are outputs of the models, ``batch`` is the batch, any other
    name is the student's aligned ``target`` or ``mask``, else a value of the batch.
    """

    def __init__(
        self, function: Callable[..., Terms], tensors: tuple[str, ...], params: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.function, self.tensors, self.params = function, tensors, dict(params)
        for name in CONVENTIONS:
            setattr(self, name, getattr(function, name, getattr(Loss, name)))

    def wants(self) -> tuple[str, ...]:
        pairs = (name.partition("_") for name in self.tensors)
        return tuple(f"{side}.{rest}" for side, _, rest in pairs if side in ("student", "teacher") and rest)

    @property
    def temperature(self) -> float | None:
        """The temperature that the function will be called with; None where it has none."""
        known = inspect.signature(self.function).parameters.get("temperature")
        return None if known is None else float(self.params.get("temperature", known.default))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        if self.topk and teacher is not None and teacher.logits is None and teacher.topk is not None:
            return self._from_topk(student, teacher.topk)
        if student.logits is None and student.unembed is not None and "student_logits" in self.tensors:
            return self._chunked(student, teacher, batch)
        return self.function(*(_bound(name, student, teacher, batch) for name in self.tensors), **self.params)

    def _from_topk(self, student: Outputs, topk: TopK) -> Tensor:
        """The same divergence where the teacher is known by its top k, taken at this loss's temperature."""
        from kdcore.functional import from_topk

        function: Any = partial(self.function, **self.params)
        return from_topk(function, student, topk, temperature=self.temperature or 1.0)

    def _chunked(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The same function on hidden states and output layers, without ever holding all logits."""
        from kdcore.functional import chunked

        if self.tensors[:2] != LOGITS:
            raise InputError("loss", f"a loss on hidden states must begin with {LOGITS}", given=self.tensors)
        if student.unembed is None or teacher.unembed is None:
            problem, hint = "the student gives hidden states, the teacher logits", "unembed = true on both"
            raise InputError("loss", problem, hint=hint)
        rest = {name: _bound(name, student, teacher, batch) for name in self.tensors[2:]}
        function: Any = self.function
        sides = student.unembed, teacher.unembed
        return chunked(function, *sides, student.mask, per_token=rest, **self.params)

    def extra_repr(self) -> str:
        # the function's own repr has an address: no two runs would be equal
        name = getattr(self.function, "__name__", "function")
        known = inspect.signature(self.function).parameters.values()
        defaults = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY}
        return ", ".join([name, *(f"{key}={value}" for key, value in {**defaults, **self.params}.items())])


def _bound(name: str, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
    side, _, rest = name.partition("_")
    if rest and side in ("student", "teacher"):
        return (student if side == "student" else teacher)[rest]
    if name == "batch":
        return batch
    if name in ("target", "mask") and getattr(student, name) is not None:
        return getattr(student, name)
    if name not in batch and name != "mask":
        raise InputError("loss", f"the loss needs {name!r}, which the batch lacks", allowed=sorted(batch))
    return batch.get(name)
