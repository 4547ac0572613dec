"""The report of a comparison: report.md, report.html (one file, no network) and comparison.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcore.comparison.stats import Difference, Pair
from kdcore.comparison.verdicts import Scale
from kdcore.report import Page, conventions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kdcore.comparison import Work

Table = Sequence[Mapping[str, Any]]  # a row an arm, as in compare.json
Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # what each finished run of an arm came to, by seed
HOW = (
    "Every arm is trained with the same seeds, and each seed gives one difference between two arms. "
    "Intervals hold 95 % confidence for the mean of one difference (paired t). p is the paired t test's, "
    "corrected by Holm's method over all differences of this report: the chance of even one false alarm "
    "among them is at most 5 %. Better and worse mean corrected p <= 0.05. Seeds needed are for power 0.8 at "
    "the level that Holm's method leaves, from the spread of the differences here, which few seeds know only "
    "roughly."
)
MATCHED = (
    "An arm is matched when its recipe differs from the recipe's own in losses, router and the task's weight "
    "alone, and when its runs, seed by seed, were seen to begin with the same student weights, the same "
    "samples in the same order, the same first augmented batch and the same teacher bits, and took as many "
    "steps."
)
SEARCH = "As many trials for every arm, on the validation split alone and with a seed of their own."


def write(
    work: Work, table: Table, verdicts: Mapping[str, str], found: Mapping[Pair, Difference], scale: Scale
) -> str:
    """Write the page into the comparison's folder and return it as markdown. All values are on the test split."""
    page, runs = Page(f"Comparison: {work.own}", work.folder), work.runs
    seeds = f"{len(work.trees)} arms, {len(work.seeds)} seeds ({work.seeds[0]} to {work.seeds[-1]})"
    page.text(f"{seeds}, judged by {work.metric} on the test split, which each run reads once, at its end.")
    page.heading("Verdict")
    page.items(verdicts.items())
    _results(page, table, found, scale)
    if table:
        page.figure("comparison.png", figure(work.metric, table, runs))
    page.heading("Matched arms")
    page.text(MATCHED)
    for row in table:
        if row["unmatched"]:
            page.warning(f"{row['arm']} is not matched to {work.own}: {'; '.join(row['unmatched'])}.")
    if table and all(row["matched"] for row in table):
        page.text("All arms are.")
    _teachers(page, work, runs)
    _others(page, work.metric, runs)
    if work.searches:
        page.heading("Search")
        page.text(SEARCH)
        best = (
            (arm, len(s["trials"]), s["val"], s["values"] or "as it was") for arm, s in work.searches.items()
        )
        page.table(("arm", "trials", f"best val {work.metric}", "values"), best)
    conventions(page, [{"arm": arm, **row} for arm, (run, *_) in runs.items() for row in run["conventions"]])
    warnings = (f"{arm}: {text}" for arm, each in runs.items() for run in each for text in run["warnings"])
    for text in dict.fromkeys(warnings):
        page.warning(text)
    page.heading("Made with")
    page.table(("what", "version"), next(iter(runs.values()))[0]["versions"].items() if runs else [])
    page.text(
        f"Seconds: the student's training, {work.jobs} at a time. Peak MB: the whole process, or the GPU."
    )
    page.save()
    return page.markdown


def _results(page: Page, table: Table, found: Mapping[Pair, Difference], scale: Scale) -> None:
    page.heading("Results")
    references = list(dict.fromkeys(reference for _, reference in found))
    against = [f"vs {reference} [95 %], p" for reference in references]
    head = ["arm", f"{scale.metric}{scale.unit}", "sd", *against]
    rows = []
    for row in table:
        told = [scale.difference(found.get((row["arm"], reference))) for reference in references]
        costs = (f"{row['seconds']:.3g}", f"{row['peak_memory'] / 2**20:.0f}", row["parameters"])
        mean, sd = scale.number(row["mean"]), scale.number(row["sd"])
        rows.append((row["arm"], mean, sd, *told, *costs, row["matched"]))
    page.table((*head, "seconds", "peak MB", "parameters", "matched"), rows)
    page.text(HOW)


def _teachers(page: Page, work: Work, runs: Runs) -> None:
    first = next(iter(runs.values()))[0] if runs else {"teachers": {}}
    names = list(dict.fromkeys(key for measured in first["teachers"].values() for key in measured))
    if names:
        page.heading("Teachers")
        rows = (
            (name, *(measured.get(key, "") for key in names), first["parameters"].get(name, ""))
            for name, measured in first["teachers"].items()
        )
        page.table(("teacher", *(name.replace("_", " ") for name in names), "parameters"), rows)
        once = f"once, with seed {work.seeds[0]}, for all arms and seeds: the verdicts hold for it"
        how = once if work.teacher == "shared" else "once a seed, for all arms"
        page.text(f"One that the recipe trains is trained {how}.")


def _others(page: Page, metric: str, runs: Runs) -> None:
    """The metrics that do not decide, and the numbers of the recipe's probes."""
    names = dict.fromkeys(name for each in runs.values() for run in each for name in run["test"])
    rows = []
    for name in (name for name in names if name != metric):
        columns = ([run["test"][name] for run in each if name in run["test"]] for each in runs.values())
        told = (f"{np.mean(c):.4g} ± {np.std(c, ddof=1):.2g}" if len(c) > 1 else "" for c in columns)
        rows.append((name.replace("_", " "), *told))
    if rows:
        page.heading("Other metrics, mean ± sd (not tested)")
        page.table(("metric", *runs), rows)


def figure(metric: str, table: Table, runs: Runs) -> Figure:
    """A dot a seed with the arms' means (a grey line joins a seed's runs), and val over the steps."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = canvas.subplots(1, 2)
    left.plot(
        [row["arm"] for row in table], [row["values"] for row in table], color="0.85", linewidth=1, zorder=1
    )
    for x, row in enumerate(table):
        left.scatter([x] * len(row["values"]), row["values"], color=f"C{x}", s=22, zorder=2)
        left.hlines(row["mean"], x - 0.25, x + 0.25, color=f"C{x}", linewidth=2.5, zorder=3)
        points = list(zip(*(run["curve"] for run in runs[row["arm"]]), strict=False))
        steps, values = [same[0][0] for same in points], [np.mean([y for _, y in same]) for same in points]
        right.plot(steps, values, color=f"C{x}", label=row["arm"])
    left.set(ylabel=f"test {metric}", xlim=(-0.5, len(table) - 0.5))
    left.tick_params(axis="x", rotation=0 if len(table) < 6 else 30)
    right.set(xlabel="step", ylabel=f"val {metric}, mean over seeds")
    right.legend(fontsize=8)
    return canvas
