"""What the numbers mean, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdcore.comparison.stats import Difference, Differences, Values, level_left, power, seeds_needed
from kdcore.task import higher_is_better, is_share


@dataclass(frozen=True)
class Scale:
    """How a metric is told: shares in points (hundredths), with one digit more for what is small."""

    metric: str
    seen: float  # the difference that one would like to see, in the metric's own unit

    @property
    def unit(self) -> str:
        return " (points)" if is_share(self.metric) else ""

    def number(self, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.2f}" if is_share(self.metric) else f"{value:{sign}.4g}"

    def amount(self, value: float, sign: str = "") -> str:
        return self.number(value, sign) + (" points" if is_share(self.metric) else "")

    def interval(self, d: Difference) -> str:
        return "" if math.isnan(d.low) else f" [{self.number(d.low)}, {self.number(d.high)}]"

    def difference(self, d: Difference | None) -> str:
        """A cell of a table; empty where nothing was compared."""
        return f"{self.number(d.mean, '+')}{self.interval(d)}, {p_value(d.corrected)}" if d else ""


def scale_of(metric: str, detect: float | None, values: Values, least: float = 0.0) -> Scale:
    """``detect`` in points (or the metric's unit); by default 0.5 points, or 1 % of the largest first value.

    ``least`` is the smallest step that the metric can make: less is not asked for.
    """
    if is_share(metric):
        return Scale(metric, max((0.5 if detect is None else detect) / 100, least))
    level = max((abs(row[0]) for row in values.values()), default=1.0)
    return Scale(metric, level / 100 if detect is None else detect)


def verdict(arm: str, differences: Differences, scale: Scale, unmatched: Sequence[str]) -> str:
    """One sentence on an arm: against kd first, then none; and whether it was a fair comparison at all."""
    level = level_left(differences)
    mine = [(theirs, d) for (ours, theirs), d in differences.items() if ours == arm]
    said = "; ".join(_against(reference, d, scale, level) for reference, d in reversed(mine))
    if unmatched:
        said += f". NOT MATCHED, so this is no evidence for the method: {'; '.join(unmatched)}"
    return said


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"


def _against(reference: str, d: Difference, scale: Scale, level: float) -> str:
    if d.shown:
        way = "better" if (d.mean > 0) == higher_is_better(scale.metric) else "worse"
        upward = d if d.mean > 0 else replace(d, mean=-d.mean, low=-d.high, high=-d.low)
        size = f"{scale.amount(upward.mean)}{scale.interval(upward)}"
        return f"{way} than {reference} by {size}, {p_value(d.corrected)}"
    head = f"no difference to {reference} shown at {d.count} seeds"
    if d.sd == 0:
        same = "the same difference, too few times to show it" if d.mean else "exactly the same result"
        return f"{head} ({scale.amount(d.mean, '+')}): every seed gave {same}"
    head += f" ({scale.amount(d.mean, '+')}{scale.interval(d)}, {p_value(d.corrected)})"
    needed = seeds_needed(scale.seen, d.sd, level) - d.count
    if needed <= 0:
        chance = power(d.count, scale.seen, d.sd, level)
        return f"{head}: {scale.amount(scale.seen)} would have been seen with power {chance:.2f}"
    head += f": {needed} more would be needed to see {scale.amount(scale.seen)}"
    here = seeds_needed(d.mean, d.sd, level) - d.count if abs(d.mean) > scale.seen else 0
    return head + (f", {here} to see {scale.amount(abs(d.mean))}" if here > 0 else "")
