"""The report of a run: report.md, report.html (one file, no network) and curves.png beside results.json."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcore.checkpoint import replacing
from kdcore.tables import Recipe

Row = Sequence[Any]
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #ccc;padding:.3em .7em;text-align:left}"
    "th{background:#f4f4f4}td.n{text-align:right;font-variant-numeric:tabular-nums}"
    "img{max-width:100%}.warn{background:#fff3cd;padding:.5em 1em;border-left:4px solid #e0a800}"
)


class Page:
    """A page that is written once and rendered as markdown and as HTML."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._markdown, self._html = [f"# {title}\n"], [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._markdown.append(f"\n## {text}\n")
        self._html.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, warn: bool = False) -> None:
        self._markdown.append(f"{'> **Warning:** ' if warn else ''}{text}\n")
        self._html.append(f"<p{' class=warn' if warn else ''}>{html.escape(text)}</p>")

    def items(self, rows: Iterable[tuple[str, str]]) -> None:
        """A list of (term, what is said of it)."""
        pairs = list(rows)
        self._markdown.append("".join(f"- **{term}**: {text}\n" for term, text in pairs))
        self._html.append(
            "<ul>"
            + "".join(f"<li><b>{html.escape(t)}</b>: {html.escape(x)}</li>" for t, x in pairs)
            + "</ul>"
        )

    def table(self, head: Row, rows: Iterable[Row]) -> None:
        shown = [[cell(value) for value in row] for row in rows]
        self._markdown.append("| " + " | ".join(map(str, head)) + " |")
        self._markdown.append("|" + " --- |" * len(head))
        self._markdown += ["| " + " | ".join(v.replace("|", "\\|") for v in row) + " |" for row in shown] + [
            ""
        ]
        body = "".join(f"<tr>{''.join(map(_td, row))}</tr>" for row in shown)
        self._html.append(
            f"<table><tr>{''.join(f'<th>{html.escape(str(h))}</th>' for h in head)}</tr>{body}</table>"
        )

    def image(self, name: str, png: bytes) -> None:
        self._markdown.append(f"![{name}]({name})\n")
        data = base64.b64encode(png).decode()
        self._html.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')

    @property
    def markdown(self) -> str:
        return "\n".join(self._markdown) + "\n"

    def save(self, folder: Path, stem: str = "report") -> None:
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f"<style>{STYLE}</style><body>{''.join(self._html)}</body></html>\n"
        )
        for suffix, text in (("md", self.markdown), ("html", page)):
            with replacing(folder / f"{stem}.{suffix}") as draft:
                draft.write_text(text, "utf-8")


def _td(text: str) -> str:
    """A table's cell; numbers are aligned at the right."""
    return f"<td{' class=n' if text[:1] in '+-0123456789' and text else ''}>{html.escape(text)}</td>"


def cell(value: Any) -> str:
    """A value as a reader wants it: four digits, no braces."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items())
    return ", ".join(map(cell, value)) if isinstance(value, list | tuple) else str(value)


def write(recipe: Recipe, folder: Path, results: Mapping[str, Any]) -> Page:
    """The report of one run."""
    page = Page(f"Distillation report: {recipe.name}")
    if recipe.description:
        page.text(recipe.description)
    test = results.get("test", {})
    if test:
        _models(page, results, test)
    if "student" in results:
        _curves(page, folder)
        _pictures(page, folder)
        _guards(page, results["student"].get("guards", {}))
        if results.get("conventions"):
            conventions(page, results["conventions"])
    for name, value in results.get("probes", {}).items():
        page.heading(f"Probe: {name}")
        page.table(("what", "value"), value.items() if isinstance(value, Mapping) else [(name, value)])
    if "export" in results:
        page.heading("Export")
        page.table(("what", "value"), results["export"].items())
    page.heading("Made with")
    page.table(("what", "version"), [("seed", results.get("seed")), *results.get("versions", {}).items()])
    page.save(folder)
    return page


def _models(page: Page, results: Mapping[str, Any], test: Mapping[str, Mapping[str, float]]) -> None:
    page.heading("Test split, read once at the end")
    metrics = list(dict.fromkeys(name for values in test.values() for name in values))
    labels = {"student": "student, distilled", "baseline": "student alone"}
    order = [*(n for n in test if n not in labels), *(n for n in ("baseline", "student") if n in test)]
    rows = []
    for name in order:
        fit = results.get(name) or results.get("teachers", {}).get(name, {})
        values = [test[name].get(metric, "") for metric in metrics]
        rows.append(
            [
                labels.get(name, f"teacher {name}"),
                *values,
                results["parameters"].get(name, ""),
                fit.get("seconds", ""),
            ]
        )
    page.table(("model", *(m.replace("_", " ") for m in metrics), "parameters", "training seconds"), rows)
    if "baseline" not in test:
        page.text("The student alone was not trained: set report.baseline = true, or run kd compare.")


def _curves(page: Page, folder: Path) -> None:
    files = sorted(folder.glob("stages/*/*/metrics.jsonl"))
    series = {f.parent.name: read_metrics(f) for f in files}
    if not series:
        return
    page.heading("Curves")
    png = curves({k: v for k, v in series.items() if not k.startswith("teacher")} or series)
    with replacing(folder / "curves.png") as draft:
        draft.write_bytes(png)
    page.image("curves.png", png)


def _pictures(page: Page, folder: Path) -> None:
    """What components drew: the PNG files of the folders ``pictures`` of the stages."""
    files = sorted(folder.glob("stages/**/pictures/*.png"))
    if files:
        page.heading("Pictures")
    for file in files:
        page.image(file.relative_to(folder).as_posix(), file.read_bytes())


def _guards(page: Page, guards: Mapping[str, Any]) -> None:
    if not guards.get("terms"):
        return
    page.heading("Guards: every loss term, when it first acted")
    page.table(
        ("term", "step", "weight", "value", "gradient norm at the outputs", "share"),
        [
            (r["term"], r["step"], r["weight"], r["value"], r["gradient_norm"], r["share"])
            for r in guards["terms"]
        ],
    )
    for warning in guards["warnings"]:
        page.text(warning, warn=True)
    page.text(
        "Frozen teachers: in eval mode and unchanged from the first step to the last (version counters)."
    )


def conventions(page: Page, rows: Sequence[Mapping[str, Any]]) -> None:
    page.heading("Loss conventions")
    page.text(
        "Sum over classes, mean over samples (tokens: over all supervised positions of the global batch)."
    )
    page.table([key.replace("_", " ") for key in rows[0]], [list(row.values()) for row in rows])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def curves(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Validation metric and loss terms over steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in series.items():
        judged = [r for r in rows if any(k.startswith("val/") for k in r)]
        if judged:
            metric = next(k for k in judged[0] if k.startswith("val/"))
            left.plot([r["step"] for r in judged], [r[metric] for r in judged], label=name)
            left.set_ylabel(metric)
        terms = list(
            dict.fromkeys(k for r in rows for k in r if k not in ("step", "lr") and not k.startswith("val/"))
        )
        for term in terms:
            points = [(r["step"], r[term]) for r in rows if term in r]
            right.plot(*zip(*points, strict=True), label=f"{name}: {term}", alpha=0.8)
    left.set_xlabel("step")
    right.set(xlabel="step", ylabel="loss terms", yscale="log" if right.lines else "linear")
    for axes in (left, right):
        if axes.lines:
            axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
