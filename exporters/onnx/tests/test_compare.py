"""Differences worked out by hand."""

import numpy as np
import pytest
from kd_exporter_onnx.compare import difference, tolerance


def f32(*values: object) -> np.ndarray:
    return np.array(values, np.float32)


def test_relative_to_the_outputs_own_scale() -> None:
    found = difference(f32([0.0, 2.0], [-4.0, 1.0]), f32([0.0, 2.0], [-4.0, 1.5]))
    assert found.relative == pytest.approx(0.5 / 4)
    assert (found.scale, found.row, found.problem) == (4.0, 1, None)


def test_small_outputs_are_held_to_the_same_share() -> None:
    big, wrong = f32([1.0, 2.0]), f32([1.0, 2.1])
    small = difference(big * np.float32(1e-6), wrong * np.float32(1e-6))
    assert small.relative == pytest.approx(difference(big, wrong).relative, rel=1e-5)


def test_zero_expected_allows_no_difference() -> None:
    assert difference(f32([0.0]), f32([0.0])).within(0)
    assert not difference(f32([0.0]), f32([1e-20])).within(1.0)


@pytest.mark.parametrize(
    "expected, actual, words",
    [
        (f32([1.0, 2.0]), f32([1.0]), "shape"),
        (f32([1.0]), np.array([[1.0]]), "dtype float64"),
        (f32([1.0]), f32([np.nan]), "NaN or infinity"),
        (f32([np.nan]), f32([np.nan]), "itself gives NaN"),
        (f32([-np.inf]), f32([-1e9]), "NaN or infinity"),
        (f32([1.0]), f32([np.inf]), "NaN or infinity"),
    ],
)
def test_what_has_no_distance_is_a_problem(expected: np.ndarray, actual: np.ndarray, words: str) -> None:
    found = difference(expected, actual)
    assert words in str(found.problem)
    assert not found.within(float("inf"))


def test_equal_infinities_are_equal() -> None:
    assert difference(f32([-np.inf, 1.0]), f32([-np.inf, 1.0])).within(0)


def test_masking_constants_do_not_hide_differences() -> None:
    expected = f32([-1e9, -1e9, 1.0, 2.0, -1.0])
    assert difference(expected, expected + f32([0, 0, 0.2, 0, 0])).relative == pytest.approx(0.1)
    assert difference(expected, expected * f32([1.5, 1, 1, 1, 1])).relative == pytest.approx(0.5)


def test_probabilities_have_no_masking_constants() -> None:
    expected = f32([1.0, 1.0, 1e-6, 1e-6, 1e-6])
    assert difference(expected, expected + f32([0, 0, 1e-6, 0, 0])).within(1e-5)


def test_integers_count_unequal_elements() -> None:
    found = difference(np.arange(10), np.array([0, 1, 2, 3, 4, 5, 6, 7, 9, 8]))
    assert found.relative == pytest.approx(0.2)
    assert found.row == 8


def test_positions_that_mean_nothing_are_left_out() -> None:
    expected, actual = f32([1.0, 1.0], [2.0, 2.0]), f32([1.0, 1.0], [7.0, 7.0])
    assert difference(expected, actual, np.array([True, False])).within(0)
    assert not difference(expected, actual, np.array([False, True])).within(0.1)


def test_default_tolerances() -> None:
    assert [tolerance(p) for p in ("fp32", "fp16", "int8")] == [1e-4, 1e-2, 5e-2]
    assert tolerance("fp32", "cuda") == 1e-4
    assert tolerance("fp32", "cuda", tf32=True) == tolerance("fp32", "tensorrt") == 1e-2
