"""The sentences: better and worse in the metric's own direction, and how many seeds are missing."""

from __future__ import annotations

import math

import pytest

from kdcore.comparison.stats import Difference
from kdcore.comparison.verdicts import scale_of, verdict

VALUES = {"none": [0.9, 0.8], "kd": [0.7, 0.8]}
ACCURACY = scale_of("accuracy", None, VALUES)


def sentence(d: Difference, metric: str = "accuracy", unmatched: tuple[str, ...] = ()) -> str:
    return verdict("pld", {("kd", "none"): d, ("pld", "kd"): d}, scale_of(metric, None, VALUES), unmatched)


def test_better_worse_and_their_directions() -> None:
    up = Difference(0.012, 0.007, 0.004, 0.02, 0.005, 5, 0.01)
    down = Difference(-0.012, 0.007, -0.02, -0.004, 0.005, 5, 0.0004)
    assert sentence(up) == "better than kd by 1.20 points [0.40, 2.00], p 0.01"
    assert sentence(down) == "worse than kd by 1.20 points [0.40, 2.00], p < 0.001"
    assert sentence(down, "calibration_error").startswith("better than kd by 1.20 points")
    assert sentence(up, "perplexity") == "worse than kd by 0.012 [0.004, 0.02], p 0.01"


@pytest.mark.parametrize(("sd", "more"), [(0.025, 194), (0.01, 29), (0.00625, 10)])
def test_the_seeds_that_are_missing(sd: float, more: int) -> None:
    """To see 0.5 points at d = 0.2, 0.5, 0.8 takes 199, 34, 15 pairs (R's pwr.t.test, power 0.8)."""
    d = Difference(0.001, sd, -0.01, 0.012, 0.8, 5, 0.9)
    told = verdict("a", {("a", "kd"): d}, ACCURACY, ())
    assert told == (
        "no difference to kd shown at 5 seeds (+0.10 points [-1.00, 1.20], p 0.9): "
        f"{more} more would be needed to see 0.50 points"
    )


def test_a_large_difference_that_is_not_shown_says_how_near_it_is() -> None:
    """d = 0.8 of the difference itself: 15 pairs by R."""
    d = Difference(0.08, 0.1, -0.05, 0.2, 0.2, 5, 0.2)
    assert verdict("a", {("a", "kd"): d}, ACCURACY, ()).endswith("to see 0.50 points, 10 to see 8.00 points")


def test_other_differences_cost_seeds() -> None:
    """Two that are not shown share the level: at 0.025, d = 0.5 takes 41 pairs (scipy's nct)."""
    d = Difference(0.0, 0.01, -0.01, 0.01, 1.0, 5, 1.0)
    assert ": 36 more would be needed" in sentence(d)


def test_enough_seeds_are_told_with_their_power() -> None:
    d = Difference(0.0001, 0.0005, -0.0005, 0.0007, 0.7, 5, 0.7)
    told = verdict("a", {("a", "none"): d}, ACCURACY, ())
    assert told.endswith(": 0.50 points would have been seen with power 1.00")


def test_equal_runs() -> None:
    same = Difference(0.0, 0.0, 0.0, 0.0, 1.0, 3, 1.0)
    assert (
        sentence(same)
        == "no difference to kd shown at 3 seeds (+0.00 points): every seed gave exactly the same result"
    )
    shifted = Difference(0.01, 0.0, math.nan, math.nan, 0.25, 3, 0.25)
    assert "the same difference, too few times to show it" in sentence(shifted)


def test_an_unmatched_arm_is_no_evidence() -> None:
    up = Difference(0.012, 0.007, 0.004, 0.02, 0.005, 5, 0.01)
    told = sentence(up, unmatched=("data.batch_size: 64 -> 32", "the number of steps"))
    assert told.endswith(
        "NOT MATCHED, so this is no evidence for the method: data.batch_size: 64 -> 32; the number of steps"
    )


def test_what_is_worth_seeing() -> None:
    assert scale_of("accuracy", None, VALUES).seen == 0.005
    assert scale_of("accuracy", 2.0, VALUES).seen == 0.02
    assert scale_of("perplexity", None, {"none": [20.0, 30.0], "kd": [-2.0]}).seen == pytest.approx(0.2)
    assert scale_of("mean_squared_error", 3.0, VALUES).seen == 3.0
    assert (
        scale_of("accuracy", 0.5, VALUES, 1 / 114).seen == 1 / 114
    )  # less than one sample was never there to see
    assert scale_of("accuracy", 2.0, VALUES, 1 / 114).seen == 0.02
