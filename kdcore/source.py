"""A recipe's text: found, read, overridden from the command line, and its places found again as lines."""

from __future__ import annotations

import copy
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kdcore import catalog, plugins
from kdcore.errors import InputError, cause, nearest
from kdcore.hookspecs import GROUP

MAX_BYTES = 1_000_000
MAX_LOCATED = 20_000  # characters; in a longer file, places are not looked up as lines
LOCK = "recipe.lock.toml"  # a run folder's copy of its recipe; its first line says where the recipe stood
MADE_FROM = "# made from a recipe in "


@dataclass(frozen=True)
class Source:
    """A recipe's text as it was read, with the folder whose modules its import strings may name."""

    tree: dict[str, Any]
    path: str = ""
    text: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        first = self.text.partition("\n")[0]
        if Path(self.path).name == LOCK and first.startswith(MADE_FROM):
            return Path(first.removeprefix(MADE_FROM))
        return Path(self.path).resolve().parent if self.path else Path.cwd()


def read(where: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()) -> Source:
    """A recipe from a file, ``slug`` or ``slug:recipe`` of an installed plugin, or a mapping; overrides applied."""
    given = tuple(overrides)
    if isinstance(where, Mapping):
        source = Source(_copied(where), overrides=given)
    else:
        path = _find(os.fspath(where))
        text, tree = _parsed(path)
        title = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).lstrip("-_.")[:80]
        source = Source({"name": title or "run", **tree}, str(path), text, given)
    for each in given:
        override(source.tree, each)
    return source


def located(error: InputError, source: Source) -> InputError:
    """The error with the override, or else the file and (where it can be found) the line, of its place."""
    if error.source:
        return error
    steps = error.place.split(".") if error.place else []
    for text in reversed(source.overrides):
        path = text.partition("=")[0].strip().split(".")
        if steps[: len(path)] == path:
            error.source = f"the override {text}"
            return error
    line = _line(source.text, steps) if len(source.text) <= MAX_LOCATED else None
    error.source = f"{source.path}, line {line}" if line else source.path
    return error


def recipes_of(slug: str) -> list[Path]:
    """The recipes (TOML files) beside an installed plugin's entry-point module, by name."""
    targets = [e.target for e in plugins.registry().entries if e.name == slug and e.distribution != GROUP]
    folders = {each for name in targets for each in getattr(sys.modules.get(name), "__path__", [])}
    return sorted(path for folder in folders for path in Path(folder).glob("*.toml"))


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of every value, and every empty table or array, in nested tables and arrays."""
    is_table = isinstance(tree, Mapping)
    if not tree or not (is_table or isinstance(tree, list)):
        yield place, tree
        return
    for key, value in tree.items() if is_table else enumerate(tree):
        yield from leaves(value, f"{place}.{key}" if place else str(key))


def override(tree: dict[str, Any], text: str) -> None:
    """Apply ``train.epochs=5`` or ``loss.0.temperature=2`` in place; a value that is no TOML is a string."""
    path, equals, value = text.partition("=")
    *parents, last = steps = path.strip().split(".")
    if not equals or not all(steps):
        raise InputError(text, "not an override", allowed="key.path=value, for example train.epochs=5")
    node: Any = tree
    for step in parents:
        key = _key(node, step, path)
        node = node[key] if isinstance(node, list) else node.setdefault(key, {})
    node[_key(node, last, path)] = _value(value)


def _key(node: Any, step: str, path: str) -> Any:
    """A step of an override as the key or index of the table or array that it is taken in."""
    if isinstance(node, dict):
        return step
    if not isinstance(node, list):
        raise InputError(path, f"there is no {step} in a value that is no table", given=node)
    if step not in map(str, range(len(node))):
        allowed = f"0 to {len(node) - 1}" if node else "none: the array is empty"
        raise InputError(path, f"there is no number {step} here", allowed=allowed)
    return int(step)


def _value(text: str) -> Any:
    try:
        tree = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return tree["v"] if len(tree) == 1 else text


def _find(where: str) -> Path:
    """The file that is meant, by its path or as a plugin's recipe."""
    try:
        path = Path(where).expanduser()
        is_folder = path.is_dir()
        if path.exists() and not is_folder:
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(where, f"not a usable path: {cause(error)}") from None
    slug, _, name = where.partition(":")
    recipes = {each.stem: each for each in recipes_of(slug)}
    if recipes and name in ("", *recipes):
        return recipes[name or next(iter(recipes))]
    if recipes:
        problem = f"plugin {slug!r} has no recipe {name!r}"
        raise InputError(where, problem, allowed=recipes, hint=nearest(name, recipes))
    if is_folder:
        raise InputError(where, "a folder, not a recipe", hint="name the .toml file")
    raise _no_recipe(where, slug)


def _no_recipe(where: str, slug: str) -> InputError:
    registry = plugins.registry()
    if trouble := registry.trouble(slug):
        why, remedy = trouble
        return InputError(where, f"{slug!r} {why}", hint=remedy)
    names = [entry.name for entry in registry.entries] + [c.name for _, _, c in registry.components()]
    if slug in names:
        problem = f"{slug!r} is installed and brings no recipe"
        return InputError(where, problem, hint="name a .toml file that uses it")
    allowed = "a path to a .toml file, or SLUG:RECIPE of an installed plugin"
    hint = nearest(where, [*names, *catalog.methods(), *Path().glob("*.toml")])
    return InputError(where, "no such recipe", allowed=allowed, hint=hint)


def _parsed(path: Path) -> tuple[str, dict[str, Any]]:
    """A file's text and tree."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(str(path), "too large for a recipe", allowed=f"at most {MAX_BYTES} bytes")
        text = raw.decode("utf-8-sig")
        return text, tomllib.loads(text)
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        what = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "valid TOML"
        raise InputError(str(path), f"not {what}: {cause(error)}") from None


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return copy.deepcopy(dict(tree))
    except Exception as error:
        raise InputError("", f"the recipe cannot be copied: {cause(error)}") from None


def _line(text: str, steps: list[str]) -> int | None:
    """The line (1-based) where the statement begins that brings the deepest part of a place that there is.

    What a TOML file begins with is a TOML file too, so its beginnings are read until one holds the place.
    """
    lines = text.splitlines(keepends=True)
    deepest = _depth(tomllib.loads(text), steps)
    starts = [n for n, line in enumerate(lines) if "=" in line or line.lstrip().startswith("[")]
    first = None
    for start, end in pairwise([*starts, len(lines)]):
        first = start if first is None else first
        try:
            tree = tomllib.loads("".join(lines[:end]))
        except ValueError:  # a statement of several lines, cut
            continue
        if deepest and _depth(tree, steps) == deepest:
            return first + 1
        first = None
    return None


def _depth(tree: Any, steps: list[str]) -> int:
    """How many of the steps lead somewhere."""
    for depth, step in enumerate(steps):
        try:
            tree = tree[int(step)] if isinstance(tree, list) else tree[step]
        except (LookupError, TypeError, ValueError):
            return depth
    return len(steps)
