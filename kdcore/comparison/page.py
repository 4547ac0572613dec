"""The report of a comparison: report.md, report.html (one file, no network) and comparison.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcore.comparison.stats import Differences
from kdcore.comparison.verdicts import Scale
from kdcore.report import AGREEMENT, COLLAPSED, SETUP, Page, conventions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kdcore.comparison import Work

Table = Sequence[Mapping[str, Any]]  # a row an arm, as in compare.json
Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # what each finished run of an arm came to
HOW = (
    "Every arm is trained with the same seeds, and each seed gives one difference between two arms. "
    "Intervals and p are over seeds alone, on this one test set: another choice of its samples is not covered. "
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


def write(work: Work, table: Table, verdicts: Mapping[str, str], found: Differences, scale: Scale) -> str:
    """Write the page into the comparison's folder and return it as markdown. All values are on the test split."""
    page = Page(f"Comparison: {work.own}", work.folder)
    runs = {arm: [*ended.values()] for arm, ended in work.outcomes.items() if ended}
    first = next(iter(runs.values()))[0] if runs else {"teachers": {}, "versions": {}}
    seeds = f"{len(work.trees)} arms, {len(work.seeds)} seeds ({work.seeds[0]} to {work.seeds[-1]})"
    page.text(f"{seeds}, judged by {work.metric} on the test split, which each run reads once, at its end.")
    page.heading("Verdict")
    page.items(verdicts.items())
    if table:
        page.section("Results", (_shown(row, found, scale) for row in table))
        _limits(page, work, scale, runs)
        page.text(HOW)
        page.figure("comparison.png", figure(work.metric, table, runs))
    _setup(page, work, runs)
    page.heading("Matched arms")
    page.text(MATCHED)
    for row in (row for row in table if row["unmatched"]):
        page.warning(f"{row['arm']} is not matched to {work.own}: {'; '.join(row['unmatched'])}.")
    if table and all(row["matched"] for row in table):
        page.text("All arms are.")
    page.section("Teachers", (_teacher(first, name) for name in first["teachers"]))
    if first["teachers"]:
        once = f"once, with seed {work.seeds[0]}, for all arms and seeds: the verdicts hold for it"
        how = once if work.teacher == "shared" else "once a seed, for all arms"
        page.text(f"One that the recipe trains is trained {how}.")
    _others(page, work.metric, runs)
    best = f"best val {work.metric}"
    page.section(
        "Search: as many trials for every arm, on the validation split alone and with a seed of their own",
        (
            {"arm": arm, **_trials(s["trials"]), best: s["val"], "values": s["values"] or "as it was"}
            for arm, s in work.searches.items()
        ),
    )
    conventions(page, [{"arm": arm, **row} for arm, (run, *_) in runs.items() for row in run["conventions"]])
    warnings = (f"{arm}: {text}" for arm, each in runs.items() for run in each for text in run["warnings"])
    for text in dict.fromkeys(warnings):
        page.warning(text)
    page.facts("Made with", first["versions"])
    page.text(f"Seconds: the student's training, {work.jobs} at a time.")
    page.save()
    return page.markdown


def _shown(row: Mapping[str, Any], found: Differences, scale: Scale) -> dict[str, Any]:
    """An arm's line of the results."""
    references = dict.fromkeys(reference for _, reference in found)
    return {
        "arm": row["arm"],
        f"{scale.metric}{scale.unit}": scale.number(row["mean"]),
        "sd": scale.number(row["sd"]),
        **{f"vs {each} [95 %], p": scale.difference(found.get((row["arm"], each))) for each in references},
        "seconds": f"{row['seconds']:.3g}",
        "parameters": row["parameters"],
        "matched": row["matched"],
    }


def _limits(page: Page, work: Work, scale: Scale, runs: Runs) -> None:
    """How fine the test split is, and the arms that learned nothing of it."""
    if step := work.step():
        seen = f"One of the {round(1 / step)} test samples is {scale.amount(step)}"
        page.text(f"{seen}; differences of less are not asked for.")
    for arm, each in runs.items():
        if bad := [seed for seed, run in work.outcomes[arm].items() if "student" in run["collapsed"]]:
            where = f"{arm}, seed {', '.join(map(str, bad))}"
            page.warning(COLLAPSED.format(where, each[0]["data"]["majority"]))


def _setup(page: Page, work: Work, runs: Runs) -> None:
    """The recipe's own arm in full, of the others what it has not."""
    own = runs[work.own][0]["setup"] if work.own in runs else []
    page.section(f"Setup of {work.own}", own)
    others = [
        {"arm": arm, **row} for arm, (run, *_) in runs.items() for row in run["setup"] if row not in own
    ]
    page.section("Setup of the others, where it differs", others)
    if own or others:
        page.text(f"{SETUP} The arm none has no losses, and no router.")


def _trials(trials: Table) -> dict[str, int]:
    return {"trials": len(trials), "of them failed": sum(each["val"] is None for each in trials)}


def _teacher(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"teacher": name, **run["teachers"][name], "parameters": run["parameters"].get(name, "")}


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
    if any(name.startswith("agreement_") for name in names):
        page.text(AGREEMENT)


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
