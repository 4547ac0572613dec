"""Which sizes of the dynamic axes are tried, and real samples cut to them."""

from collections.abc import Iterator
from math import prod

import numpy as np

from kd_exporter_onnx.artefact import Axis, TensorSpec
from kd_exporter_onnx.spec import Array, ExportSpec

Point = dict[str, int]
# A corner of the grid (several axes large at once) with data above this many bytes is left out, and said so.
CORNER_LIMIT = 1 << 28


def export_point(spec: ExportSpec) -> Point:
    """The sizes traced at export: 2 for the batch, the samples' own for other axes, where allowed.

    Never 1 where more is allowed: torch.export takes a size of 1 for a constant.
    """
    point: Point = {}
    for tensor in spec.inputs:
        for position, name in enumerate(tensor.shape):
            if isinstance(name, str):
                own = 2 if name == spec.batch_axis else spec.samples[tensor.name].shape[position]
                point[name] = nearest(spec.axes[name], max(own, 2))
    return point


def nearest(axis: Axis, size: float) -> int:
    """The allowed size nearest to `size`."""
    steps = round((size - axis.min) / axis.multiple_of)
    return max(axis.min, min(axis.max, axis.min + steps * axis.multiple_of))


def sizes(axis: Axis, used: int) -> dict[str, int]:
    """min, middle, max, and `unused`: nearest to a quarter, none of these and not the one traced."""
    named = {"min": axis.min, "middle": nearest(axis, (axis.min + axis.max) / 2), "max": axis.max}
    start = nearest(axis, axis.min + (axis.max - axis.min) / 4)
    # Four sizes are taken, so among nine neighbours one is free whenever the range has a fifth.
    near = (start + step * axis.multiple_of for step in (0, 1, -1, 2, -2, 3, -3, 4, -4))
    free = [size for size in near if axis.allows(size) and size not in {*named.values(), used}]
    return named | ({"unused": free[0]} if free else {})


def grid(spec: ExportSpec, base_bytes: int) -> tuple[list[Point], list[Point]]:
    """Points to try, and corners left out for their size.

    Each axis takes each of its sizes, once with the others as traced and once with them at their minimum;
    then all axes together at min, middle, max and unused. base_bytes: the inputs and outputs at the traced
    sizes, from which a corner's are estimated.
    """
    base = export_point(spec)
    least = {name: axis.min for name, axis in spec.axes.items()}
    options = {name: sizes(axis, base[name]) for name, axis in spec.axes.items()}
    star = [
        around | {name: size}
        for name in options
        for size in options[name].values()
        for around in (base, least)
    ]
    kinds = ("min", "middle", "max", "unused")
    corners = _unique([{n: o.get(kind, o["middle"]) for n, o in options.items()} for kind in kinds])
    large = [
        point for point in corners if point not in star and _growth(point, base) * base_bytes > CORNER_LIMIT
    ]
    return _unique([base, *star, *(point for point in corners if point not in large)]), large


def _growth(point: Point, base: Point) -> float:
    return prod(point[name] / base[name] for name in base)


def _unique(points: list[Point]) -> list[Point]:
    return list({tuple(point.items()): point for point in points}.values())


def cut(spec: ExportSpec, point: Point, start: int = 0) -> tuple[dict[str, Array], Array]:
    """Real samples at the sizes of `point`, and which samples they are.

    The batch holds samples start, start + 1, ... (again from the first when there are fewer); other axes are
    cut off or repeated, so every value is one that the student meets.
    """
    feeds = {tensor.name: _cut(tensor, spec.samples[tensor.name], point, start) for tensor in spec.inputs}
    size = len(feeds[spec.inputs[0].name])
    return feeds, (start + np.arange(size)) % spec.count


def _cut(tensor: TensorSpec, samples: Array, point: Point, start: int) -> Array:
    for axis, declared in enumerate(tensor.shape):
        size = point[declared] if isinstance(declared, str) else declared
        if axis == 0:
            samples = samples.take((start + np.arange(size)) % len(samples), axis=0)
        elif size != samples.shape[axis]:
            samples = samples.take(np.arange(size) % samples.shape[axis], axis=axis)
    return np.ascontiguousarray(samples)


def chunk_size(spec: ExportSpec, wanted: int = 32) -> int:
    """The batch in which all samples are run: the declared one, or the allowed one nearest to `wanted`."""
    first = spec.inputs[0].shape[0]
    return first if isinstance(first, int) else nearest(spec.axes[first], wanted)


def chunks(spec: ExportSpec, limit: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, how many of the batch are new) over the first `limit` evaluation samples, in order."""
    size, count = chunk_size(spec), spec.count if limit is None else min(limit, spec.count)
    for start in range(0, count, size):
        yield start, min(size, count - start)


def sample_point(spec: ExportSpec) -> Point:
    """The samples' own sizes, in batches of `chunk_size`."""
    own = {
        name: spec.samples[tensor.name].shape[axis]
        for tensor in spec.inputs
        for axis, name in enumerate(tensor.shape)
        if isinstance(name, str)
    }
    return own | ({spec.batch_axis: chunk_size(spec)} if spec.batch_axis else {})
