"""Commands that show what there is: list, show, search, plugins, doctor, schema."""

from __future__ import annotations

import json
from inspect import formatannotation
from typing import Any

import click

from kdcore import catalog, plugins
from kdcore.cli.common import JSON, KIND, show_rows
from kdcore.errors import InputError, fit, nearest
from kdcore.plugins import Entry
from kdcore.types import KINDS, Component

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Catalogued methods that are not installed, too.")
@KIND
@JSON
def list_(everything: bool, kind: str | None, as_json: bool) -> None:
    """Installed components, by kind."""
    registry, keys = plugins.registry(), ("kind", "name", "summary", "from")
    rows = [(k, c.name, c.summary, f"{e.distribution} {e.version}") for k, e, c in registry.components(kind)]
    here = {entry.name for entry in registry.entries}
    absent = [m for slug, m in sorted(catalog.methods().items()) if everything and slug not in here]
    planned = [_catalogued(method) for method in absent if not kind or kind in method["kinds"]]
    if as_json:
        show_rows(keys, [*rows, *planned], as_json)
        return
    show_rows(keys, rows)
    if planned:
        click.echo("\ncatalogued, not installed:")
        show_rows(keys, planned)
    for fault in registry.quarantine:
        click.echo(f"in quarantine: {fault.entry.name} ({fault.phase}): {fault.error}", err=True)


def _catalogued(method: dict[str, Any]) -> tuple[str, str, str, str]:
    return ",".join(method["kinds"]), method["slug"], method["summary"], method["status"]


@click.command()
@click.argument("words", nargs=-1, required=True)
def search(words: tuple[str, ...]) -> None:
    """Catalogued methods that contain all WORDS."""
    if not (text := " ".join(words)).strip():
        raise InputError("WORDS", "nothing to look for", hint="kd list --all shows everything")
    rows = [_catalogued(method) for method in catalog.search(text)]
    show_rows((), rows)
    if not rows:
        click.echo("nothing found")


@click.command()
@click.argument("name")
@KIND
def show(name: str, kind: str | None) -> None:
    """A component's parameters, what it reads, its paper and its recipes."""
    from kdcore.source import recipes_of

    registry, rows = plugins.registry(), [*plugins.registry().components()]
    slug = name.rpartition(":")[2].partition(".")[0]
    here = [each for each in rows if kind in (None, each[0])]
    parts = [(k, c.name, c.summary, e.distribution) for k, e, c in here if c.name.startswith(f"{slug}.")]
    found = [each for each in here if name in _names(each[1], each[2])]
    faults = [f"in quarantine ({f.phase}): {f.error}\n" for f in registry.quarantine if f.entry.name == slug]
    installed, method = any(entry.name == slug for entry in registry.entries), catalog.method(slug)
    known = method is not None and not kind
    if installed and not faults:
        known = name == slug and bool(parts or not kind)
    if not found and not known:
        if kind or faults or any(entry.name == slug for entry in registry.blocked):
            registry.find(kind or "loss", name, "name")  # says what the matter is
        hint = nearest(name, [component.name for _, _, component in rows] + list(catalog.methods()))
        raise InputError("name", "no such component or method", given=name, hint=hint or "kd list --all")
    if method and not (found or installed):
        click.echo(f"{slug} is not installed: {catalog.how_to_get(method)}\n")
    for each in found:
        _show_component(*each)
    for fault in faults:
        click.echo(fault)
    show_rows((), [row for row in parts if row[1] != name])
    if method:
        _show_paper(method)
    if (found or parts) and (recipes := [f"{slug}:{path.stem}" for path in recipes_of(slug)]):
        click.echo(f"recipes: {', '.join(recipes)}")


def _names(entry: Entry, component: Component) -> tuple[str, str]:
    return component.name, f"{entry.distribution}:{component.name}"


def _show_component(kind: str, entry: Entry, component: Component) -> None:
    """What it is for, its parameters and what it reads."""
    from kdcore.recipe import schema as schema_of

    target, found = schema_of(kind, f"{entry.distribution}:{component.name}")
    click.echo(
        f"{kind} {component.name}  ({entry.distribution} {entry.version})\n  {fit(component.summary, 1000)}\n"
    )
    click.echo("".join(f"  {line}\n" for line in found.doc.splitlines()))
    for field in found.model.model_fields.values():
        click.echo(f"  {field.alias}: {_parameter(field)}")
    reads = getattr(target, "reads", None) or list(found.tensors)
    click.echo(f"  reads: {', '.join(reads) or 'nothing'}\n")


def _parameter(field: Any) -> str:
    """As a reader of recipes needs it: its type, its bounds, its default."""
    rows = [(sign, getattr(each, key, None)) for each in field.metadata for key, sign in SIGNS.items()]
    bounds = " and ".join(f"{sign} {bound}" for sign, bound in rows if bound is not None)
    kind = f"{formatannotation(field.annotation)} {bounds}".strip()
    return f"{kind}, required" if field.is_required() else f"{kind} = {field.get_default()!r}"


def _show_paper(method: dict[str, Any]) -> None:
    """What the catalogue knows of a method."""
    paper, code, result = (method.get(key) for key in ("paper", "code", "result"))
    rows = [method["title"], method["summary"]]
    if paper:
        rows.append(
            " ".join(str(paper[key]) for key in ("authors", "venue", "year", "url") if paper.get(key))
        )
    if code:
        rows.append(f"authors' code: {code['repository']} ({code.get('licence') or 'licence unknown'})")
    rows.append(f"fidelity: {method['fidelity']}; status: {method['status']}")
    rows += [f"its claim on real data: {result}"] if result else []
    rows += [f"deviation: {text}" for text in method.get("deviations", [])]
    click.echo("\n".join(rows))


@click.command("plugins")
@JSON
def plugins_(as_json: bool) -> None:
    """Installed plugins and their state: ready, blocked, in quarantine, or with a name that others have, too."""
    registry = plugins.registry()
    states = {fault.entry: f"quarantine ({fault.phase}): {fault.error}" for fault in registry.quarantine}
    states |= dict.fromkeys(registry.blocked, "blocked") | dict(registry.clashes())
    entries = (*registry.entries, *registry.blocked)
    rows = [(e.name, e.distribution, e.version, states.get(e, "ready")) for e in entries]
    show_rows(("name", "distribution", "version", "state"), rows, as_json)


@click.command()
def doctor() -> int:
    """What this environment has: versions, devices, plugins in trouble, runtimes that break each other."""
    from kdcore import doctor as diagnosis

    return int(diagnosis.report(click.echo) > 0)


@click.command()
@click.option("--component", help="The parameters of one component instead.")
@KIND
def schema(component: str | None, kind: str | None) -> None:
    """The JSON schema of a recipe, or of a component's parameters."""
    from kdcore.recipe import schema as schema_of
    from kdcore.tables import Recipe

    model: Any = Recipe
    if component:
        named = {k for k, _, c in plugins.registry().components() if c.name == component.rpartition(":")[2]}
        kind = kind or next((each for each in ("loss", *KINDS) if each in named), "loss")
        model = schema_of(kind, component, "--component")[1].model
    elif kind:
        raise InputError("--kind", "says which component of one name is meant", hint="add --component NAME")
    click.echo(json.dumps(model.model_json_schema(), indent=2))
