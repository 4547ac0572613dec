"""What the command line shows: reports, tables, components, papers. No torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def report(folder: Path) -> None:
    """The report of a folder in the terminal, which says where the pictures are that it cannot show."""
    if not (folder / "report.md").exists():  # another rank writes it
        return
    text = (folder / "report.md").read_text("utf-8")
    if not sys.stdout.isatty():
        click.echo(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    text = re.sub(r"!\[.*?\]\((.*?)\)", lambda found: f"Picture: `{folder / found[1]}`", text)
    Console().print(Markdown(f"{text}\nWith its pictures: `{folder / 'report.html'}`"))


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows in columns, the last one as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for row in rows:
        click.echo("  ".join([*(v.ljust(w) for v, w in zip(row, widths, strict=False)), row[-1]]).rstrip())


def component(kind: str, entry: Any, component: Any) -> None:
    """What it is for, its parameters and what it reads."""
    from kdcore.recipe import schema as schema_of

    target, found = schema_of(kind, f"{entry.distribution}:{component.name}")
    click.echo(f"{kind} {component.name}  ({entry.distribution} {entry.version})\n  {component.summary}\n")
    click.echo("".join(f"  {line}\n" for line in found.doc.splitlines()))
    for field in found.model.model_fields.values():
        click.echo(f"  {field.alias}: {_field(field)}")
    reads = getattr(target, "reads", None) or list(found.tensors)
    click.echo(f"  reads: {', '.join(reads) or 'nothing'}\n")


def _field(field: Any) -> str:
    """A parameter as a reader of recipes needs it: its type, its bounds, its default."""
    from inspect import formatannotation

    rows = [(sign, getattr(each, key, None)) for each in field.metadata for key, sign in SIGNS.items()]
    bounds = " and ".join(f"{sign} {bound}" for sign, bound in rows if bound is not None)
    kind = f"{formatannotation(field.annotation)} {bounds}".strip()
    return f"{kind}, required" if field.is_required() else f"{kind} = {field.get_default()!r}"


def paper(entry: dict[str, Any]) -> str:
    """What the catalogue knows of a method."""
    told, code = entry.get("paper", {}), entry.get("code", {})
    where = " ".join(str(told[key]) for key in ("authors", "venue", "year", "url") if told.get(key))
    rows = [entry["title"], entry["summary"], where]
    rows += (
        [f"authors' code: {code['repository']} ({code.get('licence') or 'licence unknown'})"] if code else []
    )
    rows += [f"fidelity: {entry['fidelity']}; status: {entry['status']}"]
    rows += [f"its claim on real data: {entry['result']}"] if entry.get("result") else []
    rows += [f"deviation: {text}" for text in entry.get("deviations", [])]
    return "\n".join(filter(None, rows))
