"""How far two arrays are apart, as a share of the output's own scale. numpy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_exporter_onnx.artefact import Precision, Provider

Array = NDArray[Any]

# Shares of an output's scale. Seen on the CPU: fp32 up to 1.2e-6, fp16 up to 1e-3. TF32 keeps fp16's 10 bits.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": 5e-2}
TF32_TOLERANCE = 1e-2


def tolerance(precision: Precision, provider: Provider = "cpu", *, tf32: bool = False) -> float:
    """The default tolerance. TensorRT decides itself about TF32, so it is judged with it."""
    loose = tf32 or provider == "tensorrt"
    return max(TOLERANCE[precision], TF32_TOLERANCE) if loose else TOLERANCE[precision]


@dataclass(frozen=True)
class Difference:
    """`relative`: largest |actual - expected| / scale (integers: share of unequal ones); `row`: the worst's.

    `problem` is set where no number can be given: another shape or dtype, NaN, infinity in another place.
    """

    relative: float
    scale: float
    row: int | None
    problem: str | None = None

    def within(self, allowed: float) -> bool:
        return self.problem is None and self.relative <= allowed


def difference(expected: Array, actual: Array, keep: Array | None = None) -> Difference:
    """Compare one output. `keep` (bool, the output's leading axes) leaves out positions that mean nothing."""
    if expected.shape != actual.shape:
        return _problem(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    if expected.dtype != actual.dtype:
        return _problem(f"dtype {actual.dtype} instead of {expected.dtype}")
    if keep is not None:
        expand = keep.reshape(keep.shape + (1,) * (expected.ndim - keep.ndim))
        expected, actual = np.where(expand, expected, 0), np.where(expand, actual, 0)
    if not np.issubdtype(expected.dtype, np.floating):
        unequal = expected != actual
        return Difference(float(unequal.mean()) if unequal.size else 0.0, 1.0, _row(unequal))
    return _float_difference(expected.astype(np.float64), actual.astype(np.float64))


def _float_difference(expected: Array, actual: Array) -> Difference:
    if np.isnan(expected).any():
        return _problem("the student itself gives NaN", _row(np.isnan(expected)))
    finite = np.isfinite(expected) & np.isfinite(actual)
    wrong = ~finite & (expected != actual)
    if wrong.any():
        return _problem("NaN or infinity where the student has other values", _row(wrong))
    gap = np.abs(np.subtract(actual, expected, out=np.zeros_like(expected), where=finite))
    fill = _fill_values(expected) | ~finite
    scale = float(np.abs(expected[~fill]).max(initial=0.0))
    # A masking constant is held to its own size, or one -1e9 would hide every other difference.
    own = np.where(fill & finite, np.abs(expected), scale)
    relative = np.divide(gap, own, out=np.where(gap > 0, np.inf, 0.0), where=own > 0)
    return Difference(float(relative.max(initial=0.0)), scale, _row(relative))


def _fill_values(x: Array) -> Array:
    """True at masking constants: 100 or more, above 1000 medians, the same value more than once."""
    size = np.abs(np.where(np.isfinite(x), x, 0))
    if not size.any():
        return np.zeros(x.shape, bool)
    large = size >= max(100.0, 1000 * float(np.median(size[size > 0])))
    values, counts = np.unique(x[large], return_counts=True)
    return np.asarray(large & np.isin(x, values[counts > 1]))


def _problem(words: str, row: int | None = None) -> Difference:
    return Difference(float("inf"), 0.0, row, words)


def _row(badness: Array) -> int | None:
    if badness.ndim == 0 or badness.size == 0:
        return None
    return int(np.unravel_index(np.argmax(badness), badness.shape)[0])
