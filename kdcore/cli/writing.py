"""Commands for authors of plugins: plugin new, plugin check."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from kdcore.cli.common import PATH, Commands


@click.group(cls=Commands)
def plugin() -> None:
    """Write and check plugins."""


@plugin.command("new")
@click.argument("slug")
@click.option(
    "--kind", default="loss", show_default=True, help="teacher, student, router, loss, augmentation."
)
@click.option("--into", type=PATH, default=Path("."), help="Parent folder.")
def new(slug: str, kind: str, into: Path) -> None:
    """Write a plugin of the standard form that passes its own tests at once."""
    from kdcore import scaffold

    folder = scaffold.write(slug, kind, into)
    click.echo(f"{folder}\n  pip install -e {folder} && pytest {folder}")


@plugin.command("check")
@click.argument("name", metavar="SLUG|FOLDER")
@click.option("--without", multiple=True, metavar="CHECK", help="Leave a check out; repeatable.")
@click.option("--all", "everything", is_flag=True, help="Show the checks that passed, too.")
def check(name: str, without: tuple[str, ...], everything: bool) -> int:
    """Conformance of an installed plugin, or of a plugin's folder: what failed, and what was not looked at and why."""
    from kdcore.testing import check_plugin

    findings = check_plugin(name, without=without)
    for finding in findings:
        if everything or finding.verdict != "passed":
            click.echo(finding)
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("passed", "failed", "skipped"))
    click.echo(f"{name}: {told}")
    return int(counts["failed"] > 0)
