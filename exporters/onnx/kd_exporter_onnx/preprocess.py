"""Preprocessing as data: a closed list of steps that the loader executes, in numpy only.

Use the same `Preprocessing` object in the training data source, so that training and serving cannot disagree.
Every step works on a whole batch (first axis B) and never changes its input in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kd_exporter_onnx.errors import InputError

Array = NDArray[Any]


class _Step(BaseModel, ABC):
    """`on` names the array to work on; left out, there must be exactly one. The result takes its place."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    on: str | None = None

    @abstractmethod
    def run(self, value: Any) -> dict[str, Array]:
        """The arrays that the step adds or replaces; the key "" is the array itself."""


class _Change(_Step):
    """A step that puts one array in the place of another."""

    def run(self, value: Any) -> dict[str, Array]:
        return {"": self.apply(np.asarray(value))}

    @abstractmethod
    def apply(self, x: Array) -> Array: ...


class Cast(_Change):
    """Another dtype; values are converted as numpy's astype does."""

    step: Literal["cast"] = "cast"
    dtype: Literal["float32", "int64", "int32", "uint8", "bool"]

    def apply(self, x: Array) -> Array:
        return x.astype(self.dtype)


class Scale(_Change):
    """x * factor + offset, in float32 (1/255 for bytes)."""

    step: Literal["scale"] = "scale"
    factor: float
    offset: float = 0.0

    def apply(self, x: Array) -> Array:
        return x.astype(np.float32) * np.float32(self.factor) + np.float32(self.offset)


class Normalise(_Change):
    """(x - mean) / std along `axis`, in float32; one value each, or one for each channel."""

    step: Literal["normalise"] = "normalise"
    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    axis: int = -1

    def apply(self, x: Array) -> Array:
        return (x.astype(np.float32) - self._along(self.mean, x)) / self._along(self.std, x)

    def _along(self, values: tuple[float, ...], x: Array) -> Array:
        if len(values) not in (1, x.shape[self.axis]):
            raise InputError(
                f"normalise has {len(values)} values for axis {self.axis} of an array of shape {x.shape}"
            )
        shape = [1] * x.ndim
        shape[self.axis] = len(values)
        return np.array(values, np.float32).reshape(shape)


class Transpose(_Change):
    """Axes in another order, batch included: (0, 3, 1, 2) turns [B, H, W, C] into [B, C, H, W]."""

    step: Literal["transpose"] = "transpose"
    order: tuple[int, ...]

    def apply(self, x: Array) -> Array:
        if sorted(self.order) != list(range(x.ndim)):
            raise InputError(f"transpose {self.order} does not fit an array of shape {x.shape}")
        return np.ascontiguousarray(x.transpose(self.order))


class AddAxis(_Change):
    """A new axis of size 1: axis 1 turns grey images [B, H, W] into [B, 1, H, W]."""

    step: Literal["add_axis"] = "add_axis"
    axis: int

    def apply(self, x: Array) -> Array:
        return np.expand_dims(x, self.axis)


class Resize(_Change):
    """Bilinear to height x width, half-pixel centres, no antialiasing, in float32.

    Equal to torch's interpolate(mode="bilinear", align_corners=False); not to Pillow, which antialiases.
    """

    step: Literal["resize"] = "resize"
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    layout: Literal["hwc", "chw"] = "hwc"

    def apply(self, x: Array) -> Array:
        rows, columns = (1, 2) if self.layout == "hwc" else (x.ndim - 2, x.ndim - 1)
        return _linear(_linear(x.astype(np.float32), rows, self.height), columns, self.width)


def _linear(x: Array, axis: int, size: int) -> Array:
    """Linear interpolation of one axis to `size` points, half-pixel centres, borders repeated."""
    old = x.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
    low = np.floor(at).astype(np.int64)
    shape = [1] * x.ndim
    shape[axis] = size
    share = (at - low).astype(np.float32).reshape(shape)
    left, right = x.take(low, axis), x.take(np.minimum(low + 1, old - 1), axis)
    return np.asarray(left * (1 - share) + right * share)


class PadIds(_Step):
    """A list of token sequences to one int64 array [B, L], L the longest, rounded up to `multiple_of`.

    With `mask`, an int64 array of that name is added: 1 at tokens, 0 at padding. A sequence above
    `max_length` is an error: what to cut off is for the caller to decide.
    """

    step: Literal["pad_ids"] = "pad_ids"
    value: int
    multiple_of: int = Field(default=1, gt=0)
    max_length: int | None = None
    side: Literal["right", "left"] = "right"
    mask: str | None = None

    def run(self, value: Any) -> dict[str, Array]:
        rows = [np.asarray(row, np.int64) for row in value]
        length = self._length([len(row) for row in rows])
        ids = np.full((len(rows), length), self.value, np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            where = slice(0, len(row)) if self.side == "right" else slice(length - len(row), length)
            ids[index, where], mask[index, where] = row, 1
        return {"": ids} if self.mask is None else {"": ids, self.mask: mask}

    def _length(self, lengths: Sequence[int]) -> int:
        longest = max(lengths, default=0)
        if self.max_length is not None and longest > self.max_length:
            raise InputError(f"a sequence of {longest} tokens is longer than {self.max_length}: cut it first")
        return -(-longest // self.multiple_of) * self.multiple_of


Step = Annotated[
    Cast | Scale | Normalise | Transpose | AddAxis | Resize | PadIds, Field(discriminator="step")
]


class Preprocessing(BaseModel):
    """Steps in order, from what a receiver has to what the graph takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: tuple[Step, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _plain_list(cls, value: Any) -> Any:
        return {"steps": value} if isinstance(value, list | tuple) else value

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Raw inputs by name to the graph's inputs by name; InputError says which step failed and why."""
        arrays = dict(inputs)
        for position, step in enumerate(self.steps):
            name = self._target(step, arrays)
            try:
                results = step.run(arrays[name])
            except (ValueError, IndexError, TypeError) as error:
                raise InputError(
                    f"preprocessing step {position} ({step.step}) on {name!r}: {error}"
                ) from error
            arrays |= {key or name: value for key, value in results.items()}
        return arrays

    @staticmethod
    def _target(step: _Step, arrays: Mapping[str, Any]) -> str:
        if step.on is None and len(arrays) == 1:
            return next(iter(arrays))
        if step.on in arrays:
            return str(step.on)
        raise InputError(f"preprocessing works on {step.on!r}, but the inputs are {sorted(arrays)}")
