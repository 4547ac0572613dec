"""The grid of sizes, and samples cut to them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kd_exporter_onnx import Axis, ExportSpec
from kd_exporter_onnx import grid as grids


def spec_of(batch: dict, length: dict, count: int = 5, own: int = 12) -> ExportSpec:
    ids = np.arange(count * own).reshape(count, own)
    return ExportSpec(
        inputs=[
            {"name": "ids", "dtype": "int64", "shape": ("batch", "length")},
            {"name": "mask", "dtype": "int64", "shape": ("batch", "length")},
        ],
        outputs=("logits",),
        axes={"batch": batch, "length": length},
        samples={"ids": ids, "mask": ids % 2},
    )


@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 8), st.integers(0, 60))
def test_sizes_of_an_axis(low: int, more: int, multiple: int, used: int) -> None:
    axis = Axis(min=low * multiple, max=(low + more) * multiple, multiple_of=multiple)
    named = grids.sizes(axis, used)
    assert all(axis.allows(size) for size in named.values())
    assert (named["min"], named["max"]) == (axis.min, axis.max)
    assert abs(2 * named["middle"] - axis.min - axis.max) <= axis.multiple_of
    taken = {named["min"], named["middle"], named["max"], used}
    others = set(range(axis.min, axis.max + 1, axis.multiple_of)) - taken
    assert ("unused" in named) == bool(others)
    assert named.get("unused", min(others, default=0)) in (others or {0})


def test_every_axis_meets_all_its_sizes_alone_and_together() -> None:
    points, left_out = grids.grid(
        spec_of({"max": 8}, {"min": 4, "max": 32, "multiple_of": 4}), base_bytes=100
    )
    # by hand: batch 1, 5 (from 4.5), 8, traced 2, and 3 (nearest to 2.75); length 4, 20 (from 18), 32,
    # traced 12, and 16 (12, the nearest to 11, is the traced one)
    assert {point["batch"] for point in points} == {1, 2, 3, 5, 8}
    assert {point["length"] for point in points} == {4, 12, 16, 20, 32}
    assert points[0] == {"batch": 2, "length": 12}
    for corner in ({"batch": 1, "length": 4}, {"batch": 8, "length": 32}, {"batch": 8, "length": 4}):
        assert corner in points
    assert left_out == []
    assert len({tuple(point.items()) for point in points}) == len(points)


def test_a_corner_too_large_is_left_out_and_said() -> None:
    points, left_out = grids.grid(spec_of({"max": 1024}, {"max": 2048}), base_bytes=1 << 20)
    assert left_out[-1] == {"batch": 257, "length": 513}
    assert {"batch": 1024, "length": 2048} in left_out
    assert max(point["batch"] for point in points) == 1024
    assert max(point["length"] for point in points) == 2048


def test_samples_are_cut_and_repeated_together() -> None:
    spec = spec_of({"max": 8}, {"max": 32})
    feeds, rows = grids.cut(spec, {"batch": 7, "length": 14}, start=3)
    assert rows.tolist() == [3, 4, 0, 1, 2, 3, 4]
    np.testing.assert_array_equal(feeds["ids"][0], [*range(36, 48), 36, 37])
    np.testing.assert_array_equal(feeds["mask"], feeds["ids"] % 2)
    assert grids.cut(spec, {"batch": 1, "length": 3})[0]["ids"].tolist() == [[0, 1, 2]]


def test_all_samples_in_allowed_batches() -> None:
    spec = spec_of({"max": 2}, {"max": 32})
    assert list(grids.chunks(spec)) == [(0, 2), (2, 2), (4, 1)]
    assert grids.sample_point(spec) == {"batch": 2, "length": 12}
    multiple = spec_of({"min": 4, "max": 8, "multiple_of": 4}, {"max": 32})
    assert list(grids.chunks(multiple)) == [(0, 5)]


@pytest.mark.parametrize(
    "bad", [{"min": 3, "max": 2}, {"min": 3, "max": 8, "multiple_of": 4}, {"min": 0, "max": 2}]
)
def test_an_axis_must_make_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"multiples|greater than"):
        Axis(**bad)
