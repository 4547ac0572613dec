"""Commands that do what a recipe asks for: run, resume, compare, cache, export, bench."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

import kdcore
from kdcore.cli.common import OVERRIDES, PATH, PLUGINS_ONLY, POSITIVE, QUIET, SEED
from kdcore.errors import InputError
from kdcore.source import LOCK, override

SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
DTYPE = click.Choice(["float32", "bfloat16", "float16"])


@click.command()
@click.argument("recipe")
@OVERRIDES
@click.option("--out", type=PATH, help="Run folder (default: runs/NAME-TIME).")
@SEED
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--force", is_flag=True, help="Resume although the recipe changed.")
@click.option("--check", is_flag=True, help="Check the recipe wholly and stop.")
@QUIET
@PLUGINS_ONLY
def run(recipe: str, overrides: tuple[str, ...], check: bool, **options: Any) -> None:
    """Run RECIPE: a .toml file, or SLUG:RECIPE of an installed plugin."""
    if check:
        seed = () if options["seed"] is None else (f"seed={options['seed']}",)
        kdcore.check(
            recipe, (*overrides, *seed), plugins_only=options["plugins_only"], quiet=options["quiet"]
        )
        click.echo(f"{recipe}: a valid recipe")
    else:
        show_report("run folder", kdcore.run(recipe, overrides=overrides, **options).folder)


@click.command()
@click.argument("folder", type=PATH)
@QUIET
def resume(folder: Path, quiet: bool) -> None:
    """Go on with the run in FOLDER."""
    if not (folder / LOCK).exists():
        problem = f"no run folder: it has no {LOCK}" if folder.exists() else "no such folder"
        raise InputError(str(folder), problem)
    show_report("run folder", kdcore.run(folder / LOCK, out=folder, resume=True, quiet=quiet).folder)


@click.command()
@click.argument("recipe")
@OVERRIDES
@click.option("--arm", "arms", multiple=True, metavar="NAME[:KEY=VALUE,...]", help="An arm; repeatable.")
@click.option("--seeds", type=click.IntRange(min=2), default=5, show_default=True)
@click.option("--jobs", type=POSITIVE, default=1, show_default=True, help="Runs at the same time.")
@click.option("--tune", type=click.IntRange(min=0), default=0, help="Trials of each arm's search, on val.")
@click.option("--space", multiple=True, metavar="KEY=[LOW,HIGH]", help="What --tune searches; repeatable.")
@click.option("--teacher", type=click.Choice(["shared", "per-seed"]), default="shared", show_default=True)
@click.option("--reference", "references", multiple=True, metavar="ARM", help="Compare with it; repeatable.")
@click.option("--metric", help="What decides: one of the task's (the first), or probe.NAME.KEY.")
@click.option("--detect", type=float, help="The difference worth seeing, in points (0.5).")
@click.option("--out", type=PATH, help="Folder; an interrupted comparison goes on there.")
@QUIET
def compare(recipe: str, **options: Any) -> None:
    """Compare arms of RECIPE fairly: same data, seeds, budget; no distillation and plain KD beside them."""
    show_report("comparison", kdcore.compare(recipe, **options).folder)


@click.command()
@click.argument("recipe")
@OVERRIDES
@click.option("--teacher", metavar="NAME", help="Which teacher, where the recipe has several.")
@click.option("--out", type=PATH, help="Folder; an interrupted cache goes on there (caches/NAME-TEACHER).")
@click.option("--codec", type=click.Choice(["full", "topk"]), default="full", show_default=True)
@click.option("--k", type=POSITIVE, default=56, show_default=True, help="Entries a token of topk.")
@click.option("--mass", type=SHARE, help="Only as many entries as hold this much.")
@click.option("--dtype", type=DTYPE, help="Round to this what is not coded.")
@SEED
@QUIET
@PLUGINS_ONLY
def cache(recipe: str, **options: Any) -> None:
    """Run a teacher of RECIPE once and keep what its losses read, for use = "cached"."""
    made = kdcore.cache(recipe, **options)
    click.echo(f"{made.folder}: {len(made)} rows, teacher {made.header['teacher']['weights']}")
    name = options["teacher"] or made.header["teacher"]["name"]
    click.echo(f"kd run {recipe} teacher.{name}.use=cached teacher.{name}.path={made.folder}")


@click.command()
@click.argument("what", metavar="RUN")
@click.option("--out", type=PATH)
@click.option("--target", help="Exporter component (the recipe's, or onnx).")
@click.option("--set", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the exporter.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]))
@click.option("--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]))
@click.option("--opset", type=int)
def export(what: str, out: Path | None, target: str | None, params: tuple[str, ...], **known: Any) -> None:
    """Export the student of a RUN folder as a verified artefact."""
    tree: dict[str, Any] = {}
    for each in (*params, *(f"{key}={value}" for key, value in known.items() if value is not None)):
        override(tree, each)
    row = kdcore.export(what, out=out, target=target, params=tree)
    click.echo("\n".join(f"{key}: {value}" for key, value in row.items()))


@click.command()
@click.argument("artefact", type=PATH)
@click.option("--run", "run_folder", type=PATH, help="Time torch's student and teacher too.")
@click.option("--batch", "batches", type=POSITIVE, multiple=True, default=(1, 8, 32), show_default=True)
@click.option("--threads", type=POSITIVE, default=1, show_default=True)
def bench(artefact: Path, run_folder: Path | None, batches: tuple[int, ...], threads: int) -> None:
    """Latency and throughput of an ARTEFACT, each backend in a process of its own."""
    from kdcore import shipping

    click.echo(shipping.bench(artefact, run_folder, batches, threads))


def show_report(what: str, folder: Path) -> None:
    """The report in ``folder``; a terminal, which cannot show its pictures, is told where they are."""
    if not (folder / "report.md").exists():  # another rank writes it
        return
    text, html = (folder / "report.md").read_text("utf-8"), folder / "report.html"
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        text = re.sub(r"!\[.*?\]\((.*?)\)", lambda found: f"Picture: `{folder / found[1]}`", text)
        Console().print(Markdown(text))
    else:
        click.echo(text)
    click.echo(f"{what}: {folder}\nreport with pictures: {html}")
