"""The command line. Listing and help import no torch; an input error is one screen with exit code 2."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from kdcore import display
from kdcore.errors import InputError, KDError, nearest

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


class _Group(click.Group):
    """Commands in the order of their writing, and the nearest one for a misspelt name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            hint = nearest(args[0], self.commands) or f"commands: {', '.join(self.commands)}"
            raise click.UsageError(f"no such command: {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--debug, with any command, shows where an error was raised.",
)
@click.version_option(package_name="kdcore", prog_name="kd")
def kd() -> None:
    """Knowledge distillation from recipes."""


@kd.command()
@click.argument("recipe")
@OVERRIDES
@click.option("--out", type=click.Path(path_type=Path), help="Run folder (default: runs/NAME-TIME).")
@click.option("--seed", type=int, help="Overrides the recipe's seed.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--force", is_flag=True, help="Resume although the recipe changed.")
@click.option("--check", is_flag=True, help="Check the recipe wholly and stop.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--plugins-only", is_flag=True, help="Refuse recipes that name code outside installed plugins.")
def run(recipe: str, overrides: tuple[str, ...], check: bool, **options: Any) -> None:
    """Run RECIPE: a .toml file, or SLUG:RECIPE of an installed plugin."""
    from kdcore import api

    if check:
        seed = () if options["seed"] is None else (f"seed={options['seed']}",)
        api.check(recipe, (*overrides, *seed), plugins_only=options["plugins_only"])
        click.echo(f"{recipe}: a valid recipe")
        return
    result = api.run(recipe, overrides=overrides, **options)
    display.report(result.folder)
    click.echo(f"run folder: {result.folder}")


@kd.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True)
def resume(folder: Path, quiet: bool) -> None:
    """Go on with the run in FOLDER."""
    from kdcore import api

    lock = folder / "recipe.lock.toml"
    if not lock.exists():
        raise InputError(str(folder), "no run folder: it has no recipe.lock.toml")
    result = api.run(lock, out=folder, resume=True, quiet=quiet)
    display.report(result.folder)


@kd.command()
@click.argument("recipe")
@OVERRIDES
@click.option(
    "--arm", "arms", multiple=True, metavar="NAME[:KEY=VALUE[,KEY=VALUE]]", help="An arm; repeatable."
)
@click.option("--seeds", type=click.IntRange(min=2), default=5, show_default=True)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at the same time."
)
@click.option(
    "--tune", type=click.IntRange(min=0), default=0, help="Trials of the search for each arm, on val."
)
@click.option("--space", multiple=True, metavar="KEY=[LOW,HIGH]", help="What --tune searches; repeatable.")
@click.option("--teacher", type=click.Choice(["shared", "per-seed"]), default="shared", show_default=True)
@click.option(
    "--reference", "references", multiple=True, metavar="ARM", help="Compare with this arm, too; repeatable."
)
@click.option("--detect", type=float, help="The difference worth seeing, in points (0.5).")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder; an interrupted comparison goes on there."
)
@click.option("--quiet", is_flag=True)
def compare(recipe: str, overrides: tuple[str, ...], arms: tuple[str, ...], **options: Any) -> None:
    """Compare arms of RECIPE fairly: same data, seeds, budget; no distillation and plain KD beside them."""
    from kdcore import api

    report = api.compare(recipe, arms=list(arms), overrides=list(overrides), **options)
    display.report(report.folder)
    click.echo(f"comparison: {report.folder}")


@kd.command()
@click.argument("recipe")
@OVERRIDES
@click.option("--teacher", metavar="NAME", help="Which teacher, where the recipe has several.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder; an interrupted cache goes on there (caches/NAME-TEACHER).",
)
@click.option("--codec", type=click.Choice(["full", "topk"]), default="full", show_default=True)
@click.option(
    "--k", type=click.IntRange(min=1), default=56, show_default=True, help="Entries a token of topk."
)
@click.option(
    "--mass",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Only as many entries as hold this much.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Round to this what is not coded."
)
@click.option("--seed", type=int, help="Overrides the recipe's seed.")
@click.option("--quiet", is_flag=True)
@click.option("--plugins-only", is_flag=True, help="Refuse recipes that name code outside installed plugins.")
def cache(recipe: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Run a teacher of RECIPE once and keep what its losses read, for use = "cached"."""
    from kdcore import api

    made = api.cache(recipe, overrides=overrides, **options)
    click.echo(f"{made.folder}: {len(made)} rows, teacher {made.header['teacher']['weights']}")
    name = options["teacher"] or made.header["teacher"]["name"]
    click.echo(f"kd run {recipe} teacher.{name}.use=cached teacher.{name}.path={made.folder}")


@kd.command()
@click.argument("what", metavar="RUN")
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--target", default="onnx", show_default=True, help="Exporter component.")
@click.option("--set", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the exporter.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]))
@click.option("--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]))
@click.option("--opset", type=int)
def export(what: str, out: Path | None, target: str, params: tuple[str, ...], **known: Any) -> None:
    """Export the student of a RUN folder as a verified artefact."""
    from kdcore import shipping

    tree: dict[str, Any] = {}
    from kdcore.source import override

    for each in params:
        override(tree, each)
    tree.update({key: value for key, value in known.items() if value is not None})
    row = shipping.export(what, out=out, target=target, params=tree)
    click.echo("\n".join(f"{key}: {value}" for key, value in row.items()))


@kd.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option(
    "--run", "run_folder", type=click.Path(path_type=Path), help="Time torch's student and teacher too."
)
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 8, 32), show_default=True
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def bench(artefact: Path, run_folder: Path | None, batches: tuple[int, ...], threads: int) -> None:
    """Latency and throughput of an ARTEFACT, each backend in a process of its own."""
    from kdcore import shipping

    click.echo(shipping.bench(artefact, run_folder, batches, threads))


@kd.command("list")
@click.option("--all", "everything", is_flag=True, help="Catalogued methods that are not installed, too.")
@click.option("--kind", help="Only this kind.")
@click.option("--json", "as_json", is_flag=True)
def list_(everything: bool, kind: str | None, as_json: bool) -> None:
    """Installed components, by kind."""
    from kdcore import catalog, plugins
    from kdcore.types import KINDS

    if kind and kind not in KINDS:
        raise InputError("--kind", "no such kind", given=kind, allowed=KINDS, hint=nearest(kind, KINDS))
    registry = plugins.registry()
    rows = [(k, c.name, c.summary, f"{e.distribution} {e.version}") for k, e, c in registry.components(kind)]
    planned = []
    if everything:
        here = {entry.name for entry in registry.entries}
        planned = [
            (",".join(m["kinds"]), slug, m["summary"], m["status"])
            for slug, m in sorted(catalog.methods().items())
            if slug not in here and (not kind or kind in m["kinds"])
        ]
    if as_json:
        keys = ("kind", "name", "summary", "from")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in [*rows, *planned]], indent=2))
        return
    display.table(rows)
    if planned:
        click.echo("\ncatalogued, not installed:")
        display.table(planned)
    for fault in registry.quarantine:
        click.echo(f"in quarantine: {fault.entry.name} ({fault.phase}): {fault.error}", err=True)


@kd.command()
@click.argument("name")
@click.option("--kind", help="Where one name is of several kinds.")
def show(name: str, kind: str | None) -> None:
    """A component's parameters, what it reads, its paper and its recipes."""
    from kdcore import catalog, plugins, recipe

    registry = plugins.registry()
    found = [
        (k, e, c) for k, e, c in registry.components(kind) if name in (c.name, f"{e.distribution}:{c.name}")
    ]
    slug = name.split(":")[-1].split(".")[0]
    installed = any(e.name == slug for e in registry.entries)
    broken = any(fault.entry.name == slug for fault in registry.quarantine)
    if not found and not (name == slug if installed and not broken else catalog.method(slug)):
        registry.refuse(slug, repr(name), "name")
        if kind:
            registry.find(kind, name, "name")
        hint = nearest(name, [c.name for _, _, c in registry.components()] + list(catalog.methods()))
        raise InputError("name", "no such component or method", given=name, hint=hint or "kd list --all")
    if not found and not installed:
        click.echo(f"{slug} is not installed: {catalog.how_to_get(catalog.methods()[slug])}\n")
    for each in found:
        display.component(*each)
    for fault in [fault for fault in registry.quarantine if fault.entry.name == slug]:
        click.echo(f"in quarantine ({fault.phase}): {fault.error}\n")
    parts = [
        (k, c.name, c.summary, e.distribution)
        for k, e, c in registry.components()
        if c.name.startswith(f"{slug}.")
    ]
    display.table([row for row in parts if row[1] != name])
    if entry := catalog.method(slug):
        click.echo(display.paper(entry))
    if (found or parts) and (names := [p.stem for p in recipe.recipes_of(slug)]):
        click.echo(f"recipes: {', '.join(f'{slug}:{n}' for n in names)}")


@kd.command()
@click.argument("words", nargs=-1, required=True)
def search(words: tuple[str, ...]) -> None:
    """Catalogued methods that contain all WORDS."""
    from kdcore import catalog

    rows = [
        (",".join(m["kinds"]), m["slug"], m["summary"], m["status"]) for m in catalog.search(" ".join(words))
    ]
    display.table(rows)
    if not rows:
        click.echo("nothing found")


@kd.group(cls=_Group, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """Installed plugins, their state, and what is in quarantine."""
    if ctx.invoked_subcommand:
        return
    from kdcore import plugins as discovery

    registry = discovery.registry()
    bad = {fault.entry: f"quarantine ({fault.phase}): {fault.error}" for fault in registry.quarantine}
    rows = [(e.name, e.distribution, e.version, bad.get(e, "ready")) for e in registry.entries]
    rows += [(e.name, e.distribution, e.version, "blocked") for e in registry.blocked]
    if as_json:
        keys = ("name", "distribution", "version", "state")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
    else:
        display.table(rows)


@kd.group(cls=_Group)
def plugin() -> None:
    """Write and check plugins."""


@plugin.command("new")
@click.argument("slug")
@click.option(
    "--kind", default="loss", show_default=True, help="teacher, student, router, loss or augmentation."
)
@click.option("--into", type=click.Path(path_type=Path), default=Path("."), help="Parent folder.")
def new(slug: str, kind: str, into: Path) -> None:
    """Write a plugin of the standard form that passes its own tests at once."""
    from kdcore import scaffold

    folder = scaffold.write(slug, kind, into)
    click.echo(f"{folder}\n  pip install -e {folder} && pytest {folder}")


@plugin.command("check")
@click.argument("name", metavar="SLUG|FOLDER")
@click.option("--without", multiple=True, metavar="CHECK", help="Leave a check out; repeatable.")
@click.option("--all", "everything", is_flag=True, help="Show the checks that passed, too.")
def check_plugin(name: str, without: tuple[str, ...], everything: bool) -> None:
    """Conformance of an installed plugin, or of a plugin's folder: what failed, and what was not looked at and why."""
    from kdcore.testing import check_plugin as check

    findings = check(name, without=without)
    for finding in findings:
        if everything or finding.verdict != "passed":
            click.echo(finding)
    counts = {
        verdict: sum(f.verdict == verdict for f in findings) for verdict in ("passed", "failed", "skipped")
    }
    click.echo(f"{name}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    if counts["failed"]:
        raise SystemExit(1)


@kd.command()
def doctor() -> None:
    """What this environment has: versions, devices, plugins in trouble, runtimes that break each other."""
    from kdcore import doctor as diagnosis

    problems = diagnosis.report(click.echo)
    raise SystemExit(1 if problems else 0)


@kd.command()
@click.option("--component", help="The parameters of one component instead.")
@click.option("--kind", help="Where one name is of several kinds (loss).")
def schema(component: str | None, kind: str | None) -> None:
    """The JSON schema of a recipe, or of a component's parameters."""
    if component is None:
        from kdcore.tables import Recipe

        click.echo(json.dumps(Recipe.model_json_schema(), indent=2))
        return
    from kdcore import plugins
    from kdcore.building import schema as schema_of

    kinds = [k for k, e, c in plugins.registry().components() if component.rpartition(":")[2] == c.name]
    kind = kind or ("loss" if "loss" in kinds or not kinds else kinds[0])
    _, found = schema_of(kind, component, "--component")
    click.echo(json.dumps(found.model.model_json_schema(), indent=2))


def main(arguments: list[str] | None = None) -> None:
    """The entry point: errors in words and their exit codes."""
    debug = "--debug" in (arguments or sys.argv)
    args = [a for a in (arguments if arguments is not None else sys.argv[1:]) if a != "--debug"]
    code = _guarded(lambda: kd.main(args, prog_name="kd", standalone_mode=False), debug)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave(code)
    raise SystemExit(code)


def leave(code: int) -> NoReturn:
    """End one of several processes at once, its output written.

    While the interpreter is torn down, a thread of the process group at times aborts a run that is finished.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _guarded(call: Callable[[], Any], debug: bool) -> int:
    try:
        call()
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except click.Abort:
        click.echo("stopped", err=True)
        return 130
    except KDError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk behind the output, a folder that may not be read
        if debug:
            raise
        click.echo(f"error: {error.filename or 'the output'}: {error.strerror or error}", err=True)
        return 1
    return 0
