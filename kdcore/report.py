"""The report of a run: report.md, report.html (one file, no network) and curves.png beside results.json."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kdcore.checkpoint import replacing, write_text
from kdcore.tables import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Sequence[Any]
ROUNDING = 1e-6  # metrics come out of float32
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #ccc;padding:.3em .7em;text-align:left}"
    "th{background:#f4f4f4}td{font-variant-numeric:tabular-nums}img{max-width:100%}"
    "blockquote{background:#fff3cd;margin:1em 0;padding:.1em 1em;border-left:4px solid #e0a800}"
)
NAMES = {"baseline": "student alone", "student": "student, distilled"}  # the other models are teachers

COLLAPSED = "{}: on the test split no better than naming its most frequent class always (accuracy {:.4g})."
AGREEMENT = "Agreement: the share of test samples for which the student and that teacher name the same class."
SETUP = "Parameters that the recipe leaves at their defaults are given too, except what is off or empty."
GRADIENTS = (
    "Gradient norm: of the weighted term, at the student's outputs (logits and taps), in the first step in which "
    "the term had a weight. Share: that norm's part of the sum over all terms; below 1 % a term is called dead."
)


class Page:
    """A page of markdown in ``folder``, and the same as HTML with its pictures inside."""

    def __init__(self, title: str, folder: Path) -> None:
        self.title, self.folder = title, folder
        self._parts = [f"# {title}"]
        self._pictures: list[Path] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"## {text}")

    def text(self, text: str) -> None:
        self._parts.append(text)

    def warning(self, text: str) -> None:
        self._parts.append(f"> **Warning:** {text}")

    def items(self, rows: Iterable[tuple[str, str]]) -> None:
        """A list of (term, what is said of it)."""
        self._parts.append("\n".join(f"- **{term}**: {text}" for term, text in rows))

    def table(self, head: Row, rows: Iterable[Row]) -> None:
        """Columns of numbers are aligned at the right."""
        shown = [[cell(value).replace("|", "\\|") for value in row] for row in rows]
        numbers = [all(text[:1] in "+-0123456789" for text in column) for column in zip(*shown, strict=True)]
        rule = ["---:" if right else "---" for right in numbers or [False] * len(head)]
        self._parts.append("\n".join(f"| {' | '.join(row)} |" for row in ([*map(str, head)], rule, *shown)))

    def section(self, title: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """A heading and a table of rows by the names of their columns; nothing where there are no rows."""
        found = list(rows)
        if found:
            keys = list(dict.fromkeys(key for row in found for key in row))
            self.heading(title)
            self.table([k.replace("_", " ") for k in keys], [[row.get(k, "") for k in keys] for row in found])

    def facts(self, title: str, values: Mapping[str, Any]) -> None:
        self.section(title, ({"what": key, "value": value} for key, value in values.items()))

    def image(self, path: Path) -> None:
        """A PNG file of the folder."""
        self._pictures.append(path)
        self._parts.append(f"![{path.name}]({self._address(path)})")

    def figure(self, name: str, figure: Figure) -> None:
        """Draw a PNG into the folder, and show it."""
        with replacing(self.folder / name) as draft:
            figure.savefig(draft, format="png", dpi=110)
        self.image(self.folder / name)

    @property
    def markdown(self) -> str:
        return "\n\n".join(self._parts) + "\n"

    def save(self) -> None:
        """Write report.md and report.html."""
        from markdown_it import MarkdownIt

        body = MarkdownIt("js-default").render(self.markdown)  # shows tags of HTML as text
        for path in self._pictures:
            data = base64.b64encode(path.read_bytes()).decode()
            body = body.replace(f'src="{self._address(path)}"', f'src="data:image/png;base64,{data}"')
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f"<style>{STYLE}</style><body>{body}</body></html>\n"
        )
        for name, text in (("report.md", self.markdown), ("report.html", page)):
            write_text(self.folder / name, text)

    def _address(self, path: Path) -> str:
        return quote(path.relative_to(self.folder).as_posix())


def cell(value: Any) -> str:
    """A value as a reader wants it: four digits, no braces."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items())
    return ", ".join(map(cell, value)) if isinstance(value, list | tuple) else str(value)


def write(recipe: Recipe, folder: Path, results: Mapping[str, Any]) -> None:
    """The report of one run."""
    page = Page(f"Distillation report: {recipe.name}", folder)
    if recipe.description:
        page.text(recipe.description)
    if results.get("test"):
        page.section("Test split, read once at the end", _models(results))
        for name in collapsed(results):
            page.warning(COLLAPSED.format(NAMES.get(name, f"teacher {name}"), results["data"]["majority"]))
        if any(key.startswith("agreement_") for key in results["test"].get("student", {})):
            page.text(AGREEMENT)
        if "baseline" not in results["test"]:
            page.text("The student alone was not trained: set report.baseline = true, or run kd compare.")
    page.section("Setup", results.get("setup", ()))
    if results.get("setup"):
        page.text(SETUP)
    if "student" in results:
        _curves(page)
        pictures(page)
        _guards(page, results["student"].get("guards", {}))
        conventions(page, results.get("conventions", ()))
    for name, found in results.get("probes", {}).items():
        page.facts(f"Probe: {name}", found)
    page.facts("Export", results.get("export", {}))
    page.facts("Made with", {"seed": results.get("seed"), **results.get("versions", {})})
    page.save()


def collapsed(results: Mapping[str, Any]) -> list[str]:
    """The models of a run that classify the test split no better than its most frequent class, named always, would."""
    most, test = results.get("data", {}).get("majority"), results.get("test", {})
    return [name for name, found in test.items() if most and found.get("accuracy", 1.0) <= most + ROUNDING]


def _models(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The metrics of each model and what it cost: teachers first, the student last."""
    test: Mapping[str, Mapping[str, float]] = results["test"]
    metrics = list(dict.fromkeys(metric for values in test.values() for metric in values))
    fits = {**results, **results.get("teachers", {})}
    for name in [*(n for n in test if n not in NAMES), *(n for n in NAMES if n in test)]:
        yield {
            "model": NAMES.get(name, f"teacher {name}"),
            **{metric: test[name].get(metric, "") for metric in metrics},
            "parameters": results["parameters"].get(name, ""),
            "training seconds": fits.get(name, {}).get("seconds", ""),
        }


def _curves(page: Page) -> None:
    files = sorted(page.folder.glob("stages/*/*/metrics.jsonl"))
    series = {file.parent.name: read_metrics(file) for file in files}
    if series:
        page.heading("Curves")
        students = {name: rows for name, rows in series.items() if not name.startswith("teacher")}
        page.figure("curves.png", curves(students or series))


def pictures(page: Page) -> None:
    """What components drew: the PNG files of the folders ``pictures`` of the stages."""
    files = sorted(page.folder.glob("stages/**/pictures/*.png"))
    if files:
        page.heading("Pictures")
    for file in files:
        page.image(file)


def _guards(page: Page, guards: Mapping[str, Any]) -> None:
    page.section("Guards: every loss term, when it first acted", guards.get("terms", ()))
    if guards.get("terms"):
        for text in guards["warnings"]:
            page.warning(text)
        page.text(GRADIENTS)
        frozen = "in eval mode and unchanged from the first step to the last (version counters)"
        page.text(f"Frozen teachers: {frozen}.")


def conventions(page: Page, rows: Sequence[Mapping[str, Any]]) -> None:
    """What each loss does where frameworks differ; nothing where there is no loss."""
    page.section("Loss conventions", rows)
    if rows:
        tokens = "tokens: over all supervised positions of the global batch"
        page.text(f"Sum over classes, mean over samples ({tokens}).")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def curves(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """The first validation metric and the loss terms over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in series.items():
        keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("step", "lr")))
        metrics = [key for key in keys if key.startswith("val/")][:1]
        terms = [key for key in keys if not key.startswith("val/")]
        lines = [(left, key, name) for key in metrics] + [(right, key, f"{name}: {key}") for key in terms]
        for axes, key, label in lines:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), label=label, alpha=0.8)
        left.set_ylabel(metrics[0] if metrics else left.get_ylabel())
    left.set_xlabel("step")
    right.set(xlabel="step", ylabel="loss terms", yscale="log" if right.lines else "linear")
    for axes in (left, right):
        if axes.lines:
            axes.legend(fontsize=7)
    return figure
