"""The report of a comparison: report.md, report.html (one file, no network), comparison.png, compare.json."""

from __future__ import annotations

import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcore.checkpoint import replacing, write_json
from kdcore.comparison.stats import Difference, Pair
from kdcore.comparison.verdicts import Scale, p_value
from kdcore.report import Page, conventions

if TYPE_CHECKING:
    from kdcore.comparison import Comparison, Work

Values = Mapping[str, Sequence[float]]
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
    work: Work,
    values: Values,
    differences: Mapping[Pair, Difference],
    scale: Scale,
    unmatched: Mapping[str, Sequence[str]],
    verdicts: Mapping[str, str],
) -> Comparison:
    """Everything that a comparison leaves at the top of its folder. All values are on the test split."""
    from kdcore.comparison import Comparison

    table = [_row(work, arm, values[arm], differences, unmatched[arm]) for arm in values]
    page = Page(f"Comparison: {work.own}")
    seeds = f"{len(work.trees)} arms, {len(work.seeds)} seeds ({work.seeds[0]} to {work.seeds[-1]})"
    page.text(f"{seeds}, judged by {work.metric} on the test split, which each run reads once, at its end.")
    page.heading("Verdict")
    page.items(verdicts.items())
    _results(page, table, differences, scale)
    if values:
        png = figure(work, values)
        with replacing(work.folder / "comparison.png") as draft:
            draft.write_bytes(png)
        page.image("comparison.png", png)
    page.heading("Matched arms")
    page.text(MATCHED)
    for arm, rows in unmatched.items():
        if rows:
            page.text(f"{arm} is not matched to {work.own}: {'; '.join(rows)}.", warn=True)
    if values and not any(unmatched.values()):
        page.text("All arms are.")
    _models(page, work, values)
    _details(page, work)
    page.save(work.folder)
    record = {"metric": work.metric, "seeds": list(work.seeds), "table": table, "verdicts": verdicts}
    record["references"] = [name for name in work.references if name in values]
    more = {
        "failures": work.failures,
        "searches": work.searches,
        "recipes": work.trees,
        "runs": work.outcomes,
    }
    write_json(work.folder / "compare.json", {**record, **more})
    return Comparison(work.folder, table, dict(verdicts), page.markdown)


def _row(
    work: Work,
    arm: str,
    values: Sequence[float],
    differences: Mapping[Pair, Difference],
    unmatched: Sequence[str],
) -> dict[str, Any]:
    runs = list(work.outcomes[arm].values())
    return {
        "arm": arm,
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "values": list(values),
        **{f"vs {theirs}": _numbers(d) for (ours, theirs), d in differences.items() if ours == arm},
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "peak_memory": max(run["peak_memory"] or 0 for run in runs),
        "parameters": runs[0]["parameters"].get("student"),
        "matched": not unmatched,
        "unmatched": list(unmatched),
    }


def _numbers(d: Difference) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in dataclasses.asdict(d).items()}


def _results(
    page: Page, table: Sequence[Mapping[str, Any]], differences: Mapping[Pair, Difference], scale: Scale
) -> None:
    page.heading("Results")
    references = list(dict.fromkeys(reference for _, reference in differences))
    against = [f"vs {reference} [95 %], p" for reference in references]
    head = (
        "arm",
        f"{scale.metric}{scale.unit}",
        "sd",
        *against,
        "seconds",
        "peak MB",
        "parameters",
        "matched",
    )
    rows = []
    for row in table:
        told = [differences.get((row["arm"], reference)) for reference in references]
        shown = [
            f"{scale.number(d.mean, '+')}{scale.interval(d)}, {p_value(d.corrected)}" if d else ""
            for d in told
        ]
        costs = [f"{row['seconds']:.3g}", f"{row['peak_memory'] / 2**20:.0f}", row["parameters"]]
        rows.append(
            [row["arm"], scale.number(row["mean"]), scale.number(row["sd"]), *shown, *costs, row["matched"]]
        )
    page.table(head, rows)
    page.text(HOW)


def _models(page: Page, work: Work, values: Values) -> None:
    """The teachers, and the metrics that do not decide."""
    run = next((runs[work.seeds[0]] for arm, runs in work.outcomes.items() if arm in values), None)
    if run and run["teachers"]:
        page.heading("Teachers")
        names = list(next(iter(run["teachers"].values())))
        rows = [
            (n, *(v.get(k, "") for k in names), run["parameters"].get(n, ""))
            for n, v in run["teachers"].items()
        ]
        page.table(("teacher", *(name.replace("_", " ") for name in names), "parameters"), rows)
        once = f"once, with seed {work.seeds[0]}, for all arms and seeds: the verdicts hold for it"
        each = "once a seed, for all arms"
        page.text(f"One that the recipe trains is trained {once if work.teacher == 'shared' else each}.")
    others = [k for k in (run["test"] if run else ()) if k != work.metric]
    if others:
        page.heading("Other metrics, mean ± sd (not tested)")
        rows = []
        for arm in values:
            cells = [[r["test"][k] for r in work.outcomes[arm].values() if k in r["test"]] for k in others]
            rows.append(
                (arm, *(f"{statistics.fmean(c):.4g} ± {statistics.stdev(c):.2g}" for c in cells if c))
            )
        page.table(("arm", *(name.replace("_", " ") for name in others)), rows)


def _details(page: Page, work: Work) -> None:
    """The search, what each loss does where frameworks differ, warnings of the guards, versions."""
    if work.searches:
        page.heading("Search")
        page.text(SEARCH)
        rows = [
            (arm, len(s["trials"]), s["val"], s["values"] or "as it was") for arm, s in work.searches.items()
        ]
        page.table(("arm", "trials", f"best val {work.metric}", "values"), rows)
    firsts = {arm: next(iter(runs.values())) for arm, runs in work.outcomes.items()}
    losses = [{"arm": arm, **row} for arm, run in firsts.items() for row in run["conventions"]]
    if losses:
        conventions(page, losses)
    warnings = [
        f"{arm}: {w}" for arm, runs in work.outcomes.items() for run in runs.values() for w in run["warnings"]
    ]
    for text in dict.fromkeys(warnings):
        page.text(text, warn=True)
    page.heading("Made with")
    page.table(("what", "version"), next(iter(firsts.values()))["versions"].items() if firsts else [])
    page.text(
        f"Seconds: the student's training, {work.jobs} at a time. Peak MB: the whole process, or the GPU."
    )


def figure(work: Work, values: Values) -> bytes:
    """A PNG: a dot a seed with the arms' means (a grey line joins a seed's runs), and val over the steps."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = canvas.subplots(1, 2)
    left.plot(list(values), list(values.values()), color="0.85", linewidth=1, zorder=1)
    for x, (arm, row) in enumerate(values.items()):
        left.scatter([x] * len(row), row, color=f"C{x}", s=22, zorder=2)
        left.hlines(statistics.fmean(row), x - 0.25, x + 0.25, color=f"C{x}", linewidth=2.5, zorder=3)
        curves = [run["curve"] for run in work.outcomes[arm].values()]
        means = [statistics.fmean(y for _, y in points) for points in zip(*curves, strict=False)]
        right.plot([step for step, _ in curves[0][: len(means)]], means, color=f"C{x}", label=arm)
    left.set(ylabel=f"test {work.metric}", xlim=(-0.5, len(values) - 0.5))
    left.tick_params(axis="x", rotation=0 if len(values) < 6 else 30)
    right.set(xlabel="step", ylabel=f"val {work.metric}, mean over seeds")
    right.legend(fontsize=8)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
