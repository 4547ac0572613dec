"""The paper's five hypotheses over many matched pairs, as its notebooks test them, with the notebooks' traps repaired.

I = improvement of a distilled student over the same student trained on labels alone.
H1 distillation helps (t test of I > 0); methods differ (ANOVA). H2 I rises with the teacher's accuracy, H3 it
falls with the student's size, H3.2 with its accuracy alone, H4 with agreement, H5 with fidelity (Spearman's rho).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scipy import stats

from kd_plugin_kd_fidelity.pairs import Pair

Variant = Literal["paper", "released"]
Pairs = Sequence[Pair]
Array = np.ndarray[Any, Any]
LEVEL = 0.95


@dataclass(frozen=True)
class Finding:
    """One test. ``p`` is what the notebooks print, as if the ``n`` runs were independent; they share students and
    teachers. The rest does not assume that: ``low`` to ``high`` is a 95 % bootstrap interval over whole students,
    ``p_clustered`` the same question with one value a student (H1) or ranks within pairs (methods).
    """

    hypothesis: str
    methods: str
    statistic: str
    value: float
    p: float
    n: int
    low: float = math.nan
    high: float = math.nan
    p_clustered: float = math.nan


def grouped(pairs: Iterable[Pair], key: Callable[[Pair], Hashable]) -> dict[Hashable, list[Pair]]:
    found: dict[Hashable, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[key(pair)].append(pair)
    return found


def best_temperatures(pairs: Iterable[Pair], *, variant: Variant = "paper") -> list[Pair]:
    """One run for each (teacher, student, method, task, seed): the temperature with the best ``choice``.

    ``released``: the best accuracy on the very items that I is computed on, which raises I of every method
    that has several temperatures, also where there is nothing to find. The first of equals.
    """
    whole = grouped(pairs, lambda r: (r.teacher, r.student, r.method, r.task, r.seed))
    if variant == "released":
        return [max(runs, key=lambda r: r.accuracy) for runs in whole.values()]
    if any(math.isnan(r.choice) for runs in whole.values() if len(runs) > 1 for r in runs):
        raise ValueError("several temperatures and no held-out accuracy (choice) to choose one by")
    return [runs[0] if len(runs) == 1 else max(runs, key=lambda r: r.choice) for runs in whole.values()]


def shared_likeness(pairs: Pairs, method: str) -> list[Pair]:
    """The notebooks' join, which has no method: every method gets agreement and fidelity of ``method``'s run."""
    of = {(r.teacher, r.student, r.task, r.seed): r for r in pairs if r.method == method}
    kept = [(r, of.get((r.teacher, r.student, r.task, r.seed))) for r in pairs]
    return [replace(r, agreement=o.agreement, fidelity=o.fidelity) for r, o in kept if o is not None]


def sft_of_another_seed(pairs: Pairs) -> list[float]:
    """For each run the SFT accuracy of the next seed, NaN where there is one seed only.

    I holds -SFT of its own seed, so I and SFT fall together by their common noise alone (H3.2).
    """
    known = {(r.student, r.task, r.seed): r.sft_accuracy for r in pairs}
    seeds = {k: sorted(r.seed for r in v) for k, v in grouped(pairs, lambda r: (r.student, r.task)).items()}
    found = []
    for r in pairs:
        mine = sorted(set(seeds[r.student, r.task]))
        other = mine[(mine.index(r.seed) + 1) % len(mine)]
        found.append(known[r.student, r.task, other] if other != r.seed else math.nan)
    return found


def analyse(
    pairs: Iterable[Pair],
    *,
    variant: Variant = "paper",
    likeness_of: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Finding]:
    """All tests on one task's pairs, for all methods together (``all``) and for each.

    ``variant = "released"`` computes what the notebooks do: temperatures by test accuracy, SFT accuracy of the
    same run, and, with ``likeness_of``, one method's agreement and fidelity for all methods. Covariates that
    were not measured leave their test out. ``p_clustered`` and the intervals are worked out in both.
    """
    runs = best_temperatures(pairs, variant=variant)
    if len({r.task for r in runs}) > 1:
        raise ValueError("pairs of several tasks: analyse them one by one")
    if variant == "released" and likeness_of is not None:
        alike = shared_likeness(runs, likeness_of)
    else:
        alike = runs
    rng = np.random.default_rng(seed)
    kinds: list[tuple[str, list[Pair], list[float]]] = [
        ("H2 teacher's accuracy", runs, [r.teacher_accuracy for r in runs]),
        ("H3 student's size", runs, [r.size for r in runs]),
        (
            "H3.2 student's accuracy alone",
            runs,
            [r.sft_accuracy for r in runs] if variant == "released" else sft_of_another_seed(runs),
        ),
        ("H4 agreement", alike, [r.agreement for r in alike]),
        ("H4 gain of agreement", alike, [r.agreement - r.sft_agreement for r in alike]),
        ("H5 fidelity", alike, [r.fidelity for r in alike]),
        ("H5 gain of fidelity", alike, [r.fidelity - r.sft_fidelity for r in alike]),
    ]
    methods = list(dict.fromkeys(r.method for r in runs))
    found = [helps(some, name) for name, some in _by_method(runs, methods)]
    found += [methods_differ(runs)] if len(methods) > 1 else []
    for hypothesis, rows, covariate in kinds:
        for name in ["all", *methods] if len(methods) > 1 else ["all"]:
            kept = [
                (r, x)
                for r, x in zip(rows, covariate, strict=True)
                if name in ("all", r.method) and not math.isnan(x)
            ]
            if len({x for _, x in kept}) > 1:
                found.append(related(hypothesis, name, kept, resamples, rng))
    return found


def helps(runs: Pairs, methods: str = "all") -> Finding:
    """H1: a one-sided t test of I > 0; clustered, of the students' mean improvements."""
    gains = [r.improvement for r in runs]
    students = [fmean(r.improvement for r in rows) for rows in grouped(runs, lambda r: r.student).values()]
    test, mean = stats.ttest_1samp(gains, 0, alternative="greater"), fmean(gains)
    low = high = clustered = math.nan
    if len(students) > 1:
        again = stats.ttest_1samp(students, 0, alternative="greater")
        clustered, (low, high) = (
            float(again.pvalue),
            stats.ttest_1samp(students, 0).confidence_interval(LEVEL),
        )
    return Finding(
        "H1 I > 0", methods, f"mean I {mean:+.4g}; t", *_numbers(test), len(gains), low, high, clustered
    )


def methods_differ(runs: Pairs) -> Finding:
    """H1: one-way ANOVA of I over the methods; clustered, Friedman's ranks within each pair of models (mean over seeds)."""
    by = grouped(runs, lambda r: r.method)
    test = stats.f_oneway(*([r.improvement for r in rows] for rows in by.values()))
    blocks = [
        {m: fmean(r.improvement for r in some) for m, some in grouped(rows, lambda r: r.method).items()}
        for rows in grouped(runs, lambda r: (r.teacher, r.student)).values()
    ]
    whole = [block for block in blocks if len(block) == len(by)]
    clustered = math.nan
    tied = all(len(set(block.values())) == 1 for block in whole)
    if len(by) > 2 and len(whole) > 1 and not tied:
        clustered = float(stats.friedmanchisquare(*([b[m] for b in whole] for m in by)).pvalue)
    return Finding("H1 methods differ", "all", "F", *_numbers(test), len(runs), p_clustered=clustered)


def related(
    hypothesis: str,
    methods: str,
    kept: Sequence[tuple[Pair, float]],
    resamples: int,
    rng: np.random.Generator,
) -> Finding:
    """Spearman's rho of I and a covariate, with the interval of a bootstrap over whole students."""
    gains, x = np.array([r.improvement for r, _ in kept]), np.array([x for _, x in kept])
    test = stats.spearmanr(gains, x)
    clusters = np.unique([r.student for r, _ in kept], return_inverse=True)[1]
    low, high = cluster_bootstrap(_rho, gains, x, clusters, resamples, rng)
    return Finding(hypothesis, methods, "rho", *_numbers(test), len(gains), low, high)


def cluster_bootstrap(
    statistic: Callable[[Array, Array], float],
    a: Array,
    b: Array,
    clusters: Array,
    resamples: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """The percentile interval of ``statistic(a, b)`` when whole clusters (0, 1, ...) are drawn with replacement.

    Draws where the statistic is not defined are left out; (NaN, NaN) with fewer than 3 clusters. With few
    clusters such an interval is too short: read it as the least that is unknown.
    """
    members = [np.flatnonzero(clusters == c) for c in range(clusters.max() + 1)]
    if len(members) < 3:
        return math.nan, math.nan
    values = []
    for draw in rng.integers(len(members), size=(resamples, len(members))):
        rows = np.concatenate([members[c] for c in draw])
        values.append(statistic(a[rows], b[rows]))
    edges = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(edges[0]), float(edges[1])


def table(findings: Iterable[Finding]) -> str:
    """A Markdown table."""

    def p(value: float) -> str:
        return "" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"

    def span(f: Finding) -> str:
        return "" if math.isnan(f.low) else f"[{f.low:+.2g}, {f.high:+.2g}]"

    lines = ["| hypothesis | methods | statistic | p as if independent | 95 % over students | p clustered |"]
    lines += ["|---|---|---|---|---|---|"]
    for f in findings:
        cells = (
            f.hypothesis,
            f.methods,
            f"{f.statistic} {f.value:+.2f} (n {f.n})",
            p(f.p),
            span(f),
            p(f.p_clustered),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_method(runs: Pairs, methods: Sequence[str]) -> list[tuple[str, list[Pair]]]:
    each = [(name, [r for r in runs if r.method == name]) for name in methods]
    return [("all", list(runs)), *(each if len(methods) > 1 else [])]


def _rho(a: Array, b: Array) -> float:
    """Spearman's rho, NaN where either is constant."""
    x, y = stats.rankdata(a), stats.rankdata(b)
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread else math.nan


def _numbers(test: Any) -> tuple[float, float]:
    return float(test.statistic), float(test.pvalue)
