"""What commands share: their group, options that several take, and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kdcore.errors import InputError, fit, nearest
from kdcore.types import KINDS


class Commands(click.Group):
    """Commands in the order of their writing, and the nearest one for a misspelt name (as click >= 8.4 has it)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands:
            hint = nearest(args[0], self.commands) or f"There are: {', '.join(self.commands)}"
            raise click.UsageError(f"no such command: {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


def _known(ctx: click.Context, option: click.Parameter, kind: str | None) -> str | None:
    if kind and kind not in KINDS:
        raise InputError("--kind", "no such kind", given=kind, allowed=KINDS)
    return kind


PATH = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
QUIET = click.option("--quiet", is_flag=True, help="No progress bar.")
SEED = click.option("--seed", type=int, help="Overrides the recipe's seed.")
PLUGINS_ONLY = click.option("--plugins-only", is_flag=True, help="Refuse code outside installed plugins.")
KIND = click.option("--kind", callback=_known, help="Only this kind of component.")
JSON = click.option("--json", "as_json", is_flag=True)


def show_rows(keys: Sequence[str], rows: Sequence[tuple[str, ...]], as_json: bool = False) -> None:
    """Rows in columns, the last one as long as it is; or a JSON list of objects."""
    if as_json:
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return
    rows = [(*(fit(value, 100) for value in row[:-1]), fit(row[-1], 1000)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for row in rows:
        click.echo("  ".join([*(v.ljust(w) for v, w in zip(row, widths, strict=False)), row[-1]]).rstrip())
