"""Statistics of a comparison: paired differences over seeds, Holm's correction, power. No training here."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 10_000
ROUNDING = 1e-6  # metrics come out of float32: a smaller spread, relative to the values, is none

Values = Mapping[str, Sequence[float]]  # an arm's, seed by seed
Pair = tuple[str, str]  # (arm, reference)


@dataclass(frozen=True)
class Difference:
    """ours - theirs, seed by seed. ``low`` and ``high`` bound the mean with 95 % confidence, uncorrected;
    ``p`` is two-sided; ``corrected`` is p after Holm, over all differences of a report."""

    mean: float
    sd: float
    low: float
    high: float
    p: float
    count: int
    corrected: float = math.nan

    @property
    def shown(self) -> bool:
        """Whether the difference is one, at the level 0.05 for the whole report."""
        return self.corrected <= LEVEL

    def told(self) -> dict[str, float | None]:
        """As JSON, which knows no nan."""
        return {key: None if math.isnan(value) else value for key, value in asdict(self).items()}


Differences = Mapping[Pair, Difference]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The paired t test of two lists of at least two equally ordered values.

    Where all differences are the same to rounding, t divides by zero. If they are 0, p is 1; otherwise the
    exact sign test stands in, p = 2 / 2^n, and the interval is unknown (nan): metrics on a small test set
    are coarse, and equal differences at three seeds are no proof.
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"two lists of the same length, at least 2, not {a.shape} and {b.shape}")
    d, count, noise = a - b, len(a), ROUNDING * np.abs([a, b]).max()
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    if sd <= noise and abs(mean) <= noise:
        return Difference(0.0, 0.0, 0.0, 0.0, 1.0, count)
    if sd <= noise:
        return Difference(mean, 0.0, math.nan, math.nan, 2.0 / 2**count, count)
    error = sd / math.sqrt(count)
    half = error * float(stats.t.ppf(1 - LEVEL / 2, count - 1))
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Difference(mean, sd, mean - half, mean + half, p, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): to reject where <= level keeps the family-wise error rate there."""
    p = np.asarray(p_values, float)
    order, left = np.argsort(p, kind="stable"), np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, left * p[order]))
    return [float(each) for each in adjusted]


def compare_all(values: Values, references: Sequence[str]) -> dict[Pair, Difference]:
    """(arm, reference) -> difference of every arm to every reference, each pair once; Holm over all."""
    pairs: list[Pair] = []
    for reference in references:
        pairs += [(arm, reference) for arm in values if arm != reference and (reference, arm) not in pairs]
    found = [paired(values[arm], values[reference]) for arm, reference in pairs]
    corrected = holm([d.p for d in found])
    return {pair: replace(d, corrected=p) for pair, d, p in zip(pairs, found, corrected, strict=True)}


def level_left(differences: Differences) -> float:
    """The level that a difference not shown yet would be held to: Holm's, with the shown ones taken out."""
    return LEVEL / max(sum(not d.shown for d in differences.values()), 1)


def power(count: int, effect: float, sd: float, level: float = LEVEL) -> float:
    """The chance that ``count`` pairs show a true difference ``effect``, whose pairs spread by ``sd``.

    The noncentral t distribution as a mean over chi quantiles: scipy's own nct is nan in its far tails.
    """
    edge, shift = float(stats.t.ppf(1 - level / 2, count - 1)), abs(effect) / sd * math.sqrt(count)
    spread = np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, count - 1) / (count - 1))
    return float((stats.norm.sf(edge * spread - shift) + stats.norm.cdf(-edge * spread - shift)).mean())


def seeds_needed(effect: float, sd: float, level: float = LEVEL) -> int:
    """The fewest pairs that show a true difference ``effect`` with power 0.8 (at most MOST_SEEDS)."""
    counts = range(2, MOST_SEEDS)
    return 2 + bisect_left(counts, POWER, key=lambda count: power(count, effect, sd, level))
