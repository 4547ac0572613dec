"""Find a plugin by its slug, or in a folder, installed or not."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from kdcore import plugins, recipe
from kdcore.errors import InputError, nearest
from kdcore.hookspecs import GROUP
from kdcore.types import Component


@dataclass
class Plugin:
    """An installed plugin, as its own checks see it. ``recipes``: files, by name."""

    entry: plugins.Entry
    folder: Path | None
    components: list[tuple[str, Component]]
    fault: plugins.Fault | None
    recipes: list[Path]


@contextmanager
def opened(where: str | os.PathLike[str]) -> Iterator[Plugin]:
    """The plugin that a slug, a distribution or a folder names; InputError where there is none."""
    folder, name = Path(where), os.fspath(where)
    in_folder = (folder / "pyproject.toml").is_file()
    with _installed(folder) if in_folder else nullcontext(name) as slug:
        registry = plugins.registry()
        found = [e for e in registry.entries if slug in (e.name, e.distribution)]
        if not found:
            hint = nearest(slug, [e.name for e in registry.entries])
            raise InputError(name, "no such plugin, and no folder with a pyproject.toml", hint=hint)
        if len(sources := sorted({e.distribution for e in found})) > 1:
            raise InputError(name, f"{len(sources)} distributions bring it: name one", allowed=sources)
        entry = found[0]
        offered = [(kind, c) for kind, e, c in registry.components() if e == entry]
        fault = next((f for f in registry.quarantine if f.entry == entry), None)
        place = folder.resolve() if in_folder else None
        yield Plugin(entry, place, offered, fault, recipe.recipes_of(entry.name))


@contextmanager
def _installed(folder: Path) -> Iterator[str]:
    """The plugin in a folder as if installed: its metadata on the path, which discovery reads as any other."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8")).get("project", {})
    except tomllib.TOMLDecodeError as error:
        raise InputError(str(folder / "pyproject.toml"), f"not valid TOML: {error}") from None
    points = project.get("entry-points", {}).get(GROUP, {})
    if not points:
        problem = f'no entry point in the group "{GROUP}"'
        raise InputError(str(folder), problem, hint="kd plugin new writes one")
    name, modules = project.get("name", folder.name), {p.partition(".")[0] for p in points.values()}
    with tempfile.TemporaryDirectory() as scratch:
        info = Path(scratch) / f"{name.replace('-', '_')}-0.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {each}\n" for each in project.get("dependencies", []))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n{needs}", "utf-8")
        rows = "".join(f"{key} = {value}\n" for key, value in points.items())
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{rows}", "utf-8")
        before = list(sys.path)
        sys.path[:0] = [scratch, str(folder.resolve()), str(folder.resolve() / "src")]
        _forget(modules)
        try:
            yield next(iter(points))
        finally:
            sys.path[:] = before
            _forget(modules)


def _forget(modules: set[str]) -> None:
    """A registry and modules of another place must not answer for this one."""
    for name in [n for n in sys.modules if n.partition(".")[0] in modules]:
        del sys.modules[name]
    importlib.invalidate_caches()
    plugins.registry.cache_clear()
