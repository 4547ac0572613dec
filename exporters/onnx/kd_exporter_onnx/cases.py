"""The cases of an export: real samples at every point of the grid, and the student's own outputs on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_exporter_onnx import replay
from kd_exporter_onnx.capture import Graph
from kd_exporter_onnx.grid import Point, chunks, cut, export_point, grid, sample_point
from kd_exporter_onnx.spec import Array, ExportSpec

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Inputs of one run, the student's outputs, which samples its rows are, and how many are new."""

    path: Path
    point: Point
    feeds: dict[str, Array]
    expected: dict[str, Array]
    rows: Array
    new: int

    def actual(self) -> Arrays:
        """What the fresh process gave."""
        return replay.restore(replay.output_of(self.path))


@dataclass(frozen=True)
class Cases:
    """Everything that is replayed: the grid, all samples in order, the same samples raw."""

    grid: list[Case]
    samples: list[Case]
    raw: list[Path] = field(default_factory=list)
    left_out: list[Point] = field(default_factory=list)

    @property
    def graph(self) -> list[Case]:
        return [*self.grid, *self.samples]

    def gather(self, outputs: list[Arrays]) -> Arrays:
        """Outputs of the sample cases, one row for each sample; a list where rows differ in shape."""
        names = outputs[0].keys()
        return {name: _join([o[name] for o in outputs], self.samples) for name in names}


def _join(values: list[Any], cases: list[Case]) -> Any:
    if isinstance(values[0], np.ndarray) and values[0].ndim == 0:
        return np.stack(values)
    trimmed = [v[: c.new] if len(v) == len(c.rows) else v for v, c in zip(values, cases, strict=True)]
    alike = not isinstance(values[0], list) and len({value.shape[1:] for value in trimmed}) == 1
    return np.concatenate(trimmed) if alike else [row for value in trimmed for row in value]


def reference(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The student's own outputs, eager, without gradients."""
    with torch.no_grad():
        outputs = graph(*(torch.from_numpy(feeds[name]) for name in graph.inputs))
    return {name: value.numpy() for name, value in zip(graph.outputs, outputs, strict=True)}


def record(graph: Graph, spec: ExportSpec, folder: Path) -> Cases:
    """Run the student on every case, and leave the inputs on disk for the fresh process."""

    def case(name: str, point: Point, start: int, new: int = 0) -> Case:
        feeds, rows = cut(spec, point, start)
        replay.save(folder / name, feeds)
        return Case(folder / name, point, feeds, reference(graph, feeds), rows, new)

    base = case("base.npz", export_point(spec), 0)
    size = sum(value.nbytes for value in [*base.feeds.values(), *base.expected.values()])
    points, left_out = grid(spec, size)
    # Each point starts at another sample, so that the grid sees more than the first few.
    tried = [case(f"grid{index:03d}.npz", point, 7 * index) for index, point in enumerate(points)]
    samples = [case(f"samples{start:06d}.npz", sample_point(spec), start, new) for start, new in chunks(spec)]
    return Cases(tried, samples, _record_raw(spec, samples, folder), left_out)


def _record_raw(spec: ExportSpec, samples: list[Case], folder: Path) -> list[Path]:
    if spec.raw_samples is None:
        return []
    paths = [folder / f"raw{index:06d}.npz" for index in range(len(samples))]
    for path, case in zip(paths, samples, strict=True):
        replay.save(path, {name: rows_of(value, case.rows) for name, value in spec.raw_samples.items()})
    return paths


def rows_of(values: Any, rows: Array) -> Any:
    """These samples of an array, or of a list of arrays of different shape."""
    return [values[row] for row in rows] if isinstance(values, list) else values[rows]
