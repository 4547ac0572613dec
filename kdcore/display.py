"""What the command line shows: reports, tables, components, papers. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def report(path: Path) -> None:
    """A markdown report in the terminal."""
    if not path.exists():  # another rank writes it
        return
    text = path.read_text("utf-8")
    if not sys.stdout.isatty():
        click.echo(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows in columns, the last one as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        click.echo("  ".join([*(v.ljust(w) for v, w in zip(row, widths, strict=False)), row[-1]]).rstrip())


def component(kind: str, entry: Any, component: Any) -> None:
    """What it is for, its parameters and what it reads."""
    from kdcore.building import schema as schema_of

    target, found = schema_of(kind, f"{entry.distribution}:{component.name}")
    click.echo(f"{kind} {component.name}  ({entry.distribution} {entry.version})\n  {component.summary}\n")
    click.echo("".join(f"  {line}\n" for line in found.doc.splitlines()))
    for field in found.model.model_fields.values():
        click.echo(f"  {field.alias}: {_field(field)}")
    reads = getattr(target, "reads", None) or list(found.tensors)
    click.echo(f"  reads: {', '.join(reads) or 'nothing'}\n")


def _field(field: Any) -> str:
    """A parameter as a reader of recipes needs it: its type, its bounds, its default."""
    import inspect

    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {getattr(each, key)}"
        for each in field.metadata
        for key, sign in signs.items()
        if hasattr(each, key)
    ]
    kind = " ".join([inspect.formatannotation(field.annotation), " and ".join(bounds)]).strip()
    return f"{kind}, required" if field.is_required() else f"{kind} = {field.get_default()!r}"


def paper(entry: dict[str, Any]) -> str:
    """What the catalogue knows of a method."""
    told, code = entry.get("paper", {}), entry.get("code", {})
    rows = [entry["title"], entry["summary"]]
    if told:
        rows.append(" ".join(str(told[k]) for k in ("authors", "venue", "year", "url") if told.get(k)))
    if code:
        rows.append(f"authors' code: {code['repository']} ({code.get('licence') or 'licence unknown'})")
    rows.append(f"fidelity: {entry['fidelity']}; status: {entry['status']}")
    if entry.get("result"):
        rows.append(f"its claim on real data: {entry['result']}")
    return "\n".join(rows + [f"deviation: {text}" for text in entry.get("deviations", [])])
