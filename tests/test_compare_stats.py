"""The statistics of a comparison against scipy, published numbers and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kdcore.comparison.stats import (
    LEVEL,
    POWER,
    compare_all,
    holm,
    level_left,
    paired,
    power,
    seeds_needed,
)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_paired_is_scipys(count: int) -> None:
    rng = np.random.default_rng(count)
    ours, theirs = rng.normal(0.9, 0.02, count), rng.normal(0.88, 0.03, count)
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    found = paired(ours, theirs)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.mean == pytest.approx((ours - theirs).mean())
    assert found.count == count


def test_equal_results_are_no_difference() -> None:
    found = paired([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_same_difference_everywhere_is_judged_by_signs() -> None:
    """A t test would say p = 0. Three seeds of the same sign have two-sided probability 2 / 2^3."""
    for shift in (0.1, -0.1):
        found = paired([0.5 + shift, 0.6 + shift, 0.7 + shift], [0.5, 0.6, 0.7])
        assert found.p == pytest.approx(0.25)
        assert found.mean == pytest.approx(shift)
        assert math.isnan(found.low)


def test_rounding_is_no_spread() -> None:
    """Metrics are float32: their differences vary in the eighth digit where nothing varied."""
    theirs = [float(np.float32(x)) for x in (0.91, 0.47, 0.13, 0.77)]
    ours = [float(np.float32(x) + np.float32(0.02)) for x in (0.91, 0.47, 0.13, 0.77)]
    assert paired(ours, theirs).p == pytest.approx(2 / 2**4)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_lists_that_are_no_pairs(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="same length"):
        paired(ours, theirs)


def test_holm_published() -> None:
    """The example of MultipleTesting.jl's documentation (v0.6, Holm adjustment)."""
    assert holm([0.001, 0.01, 0.03, 0.5]) == pytest.approx([0.004, 0.03, 0.06, 0.5])


def test_holm_keeps_order_and_bounds() -> None:
    """By hand: 3 x 0.01, then max(0.03, 2 x 0.012), and 1 x 0.9; in the order given."""
    assert holm([0.9, 0.012, 0.01]) == pytest.approx([0.9, 0.03, 0.03])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("effect", "count"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_published(effect: float, count: int) -> None:
    """R's pwr.t.test(d, power = 0.8, type = "paired"): n = 198.15, 33.37, 14.30."""
    assert seeds_needed(effect, 1.0) == count
    assert seeds_needed(-10 * effect, 10.0) == count


def test_power_published() -> None:
    """Dalgaard, Introductory Statistics with R, 8.3: delta 10, sd 10 sqrt 2, power 0.85 needs n = 19.96892."""
    sd = 10 * math.sqrt(2)
    assert power(19, 10, sd) < 0.85 < power(20, 10, sd)


@pytest.mark.parametrize("count", [2, 5, 30])
@pytest.mark.parametrize("effect", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_power_is_the_noncentral_t(count: int, effect: float, level: float) -> None:
    edge, shift = stats.t.ppf(1 - level / 2, count - 1), effect * math.sqrt(count)
    expected = 1 - stats.nct.cdf(edge, count - 1, shift)
    if np.isfinite(lower := stats.nct.cdf(-edge, count - 1, shift)):  # scipy's tail, where it has one
        expected += lower
    assert power(count, effect, 1.0, level) == pytest.approx(expected, abs=1e-4)


def test_seeds_needed_is_the_least_and_bounded() -> None:
    for effect in (0.3, 1.0, 4.0, 1000.0):
        count = seeds_needed(effect, 1.0, 0.01)
        assert power(count, effect, 1.0, 0.01) >= POWER
        assert count == 2 or power(count - 1, effect, 1.0, 0.01) < POWER
    assert seeds_needed(1e-9, 1.0) == 10_000


def test_every_pair_once_and_corrected_together() -> None:
    rng = np.random.default_rng(0)
    values = {name: list(rng.normal(0, 1, 5)) for name in ("none", "kd", "a", "b")}
    found = compare_all(values, ["none", "kd"])
    assert list(found) == [("kd", "none"), ("a", "none"), ("b", "none"), ("a", "kd"), ("b", "kd")]
    ps = [stats.ttest_rel(values[ours], values[theirs]).pvalue for ours, theirs in found]
    assert min(d.corrected for d in found.values()) == pytest.approx(min(1, 5 * min(ps)))


def test_level_left_counts_what_is_not_shown() -> None:
    values = {"none": [0.0, 0.1, 0.2, 0.05], "kd": [5.0, 5.2, 5.1, 5.05], "a": [5.1, 5.1, 5.2, 4.9]}
    found = compare_all(values, ["none", "kd"])
    assert [pair for pair, d in found.items() if not d.shown] == [("a", "kd")]
    assert level_left(found) == LEVEL


def _report_shows_something(rng: np.random.Generator, seeds: int, step: float, gain: float = 0.0) -> bool:
    """One report of arms without a true difference (``gain`` apart): what seeds share, noise, coarse metrics."""
    shared = rng.normal(0.9, 0.02, seeds)
    arms = {n: shared + rng.normal(0, 0.01, seeds) for n in ("none", "kd", "a", "twin")}
    arms["a"] = arms["a"] + gain
    coarse = {n: list(np.round(v / step) * step if step else v) for n, v in arms.items()}
    return any(d.shown for d in compare_all(coarse, ["none", "kd"]).values())


@pytest.mark.parametrize(("seeds", "step"), [(3, 0.0), (5, 0.0), (5, 1 / 100), (4, 1 / 629)])
def test_false_alarms_at_the_level_stated(seeds: int, step: float) -> None:
    """Any false alarm in a report: at most 5 % of reports. Bound: what 5 % gives in all but 1 of 10^5 tries."""
    rng, repetitions = np.random.default_rng(seeds), 1500
    alarms = sum(_report_shows_something(rng, seeds, step) for _ in range(repetitions))
    assert alarms <= stats.binom.isf(1e-5, repetitions, LEVEL)


def test_a_true_difference_is_shown() -> None:
    rng = np.random.default_rng(1)
    assert sum(_report_shows_something(rng, 5, 0.0, gain=0.08) for _ in range(100)) >= 90


def test_power_by_simulation() -> None:
    rng, repetitions = np.random.default_rng(2), 4000
    samples = rng.normal(0.9, 1.0, (repetitions, 8))
    shown = int((stats.ttest_1samp(samples, 0, axis=1).pvalue <= LEVEL).sum())
    low, high = stats.binom.interval(1 - 1e-5, repetitions, power(8, 0.9, 1.0))
    assert low <= shown <= high
