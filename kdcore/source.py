"""A recipe's text: found, read, overridden from the command line, and its places found again as lines."""

from __future__ import annotations

import copy
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kdcore import catalog, plugins
from kdcore.errors import InputError, blame, nearest
from kdcore.hookspecs import GROUP

MAX_BYTES = 1_000_000
MAX_READ = 10_000_000  # characters, read again and again to find a line; in a longer file none is looked up
TOML = 'KEY = VALUE, text in "quotes", true or false, [table]'
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
        with blame("", "the recipe cannot be copied"):
            source = Source(copy.deepcopy(dict(where)), overrides=given)
    else:
        path = _find(os.fspath(where))
        text, tree = _parsed(path)
        title = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).lstrip("-_.")[:80]
        named = tree if path.name == LOCK else {"name": title or "run", **tree}  # a lock is whole
        source = Source(named, str(path), text, given)
    with located(source):
        for each in given:
            override(source.tree, each)
    return source


@contextmanager
def located(source: Source) -> Iterator[None]:
    """An InputError of this block gets the override, or else the file and the line, of its place."""
    try:
        yield
    except InputError as error:
        error.source = error.source or _origin(error.place, source)
        raise


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
    if not equals or not all(path.strip().split(".")):
        raise InputError(text, "not an override", allowed="key.path=value, for example train.epochs=5")
    put(tree, path.strip(), _value(value))


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set what stands at a dotted path, in place; tables on the way are made where there are none."""
    *parents, last = path.split(".")
    node: Any = tree
    for step in parents:
        key = _key(node, step, path)
        node = node[key] if isinstance(node, list) else node.setdefault(key, {})
    node[_key(node, last, path)] = value


def _key(node: Any, step: str, path: str) -> Any:
    """A step of an override as the key or index of the table or array that it is taken in."""
    if isinstance(node, dict):
        return step
    indices = [str(index) for index in range(len(node))] if isinstance(node, list) else []
    if step not in indices:
        hint = "an array is made longer by giving it whole: KEY=[...]" if isinstance(node, list) else None
        problem = f"there is no {step} here"
        raise InputError(path, problem, given=node, allowed=indices or "nothing", hint=hint)
    return int(step)


def _value(text: str) -> Any:
    try:
        (value,) = tomllib.loads(f"v = {text}").values()
    except (ValueError, RecursionError):  # no TOML, or more than one statement
        return text
    return value


def _find(where: str) -> Path:
    """The file that is meant, by its path or as a plugin's recipe."""
    path = os.path.expanduser(where)
    if os.path.exists(path) and not os.path.isdir(path):
        return Path(path)
    slug, _, name = where.partition(":")
    recipes = {each.stem: each for each in recipes_of(slug)}
    if not recipes:
        _refuse(where, slug)
    if name not in ("", *recipes):
        raise InputError(where, f"plugin {slug!r} has no recipe {name!r}", given=name, allowed=recipes)
    first = next(iter(recipes))
    if not name and len(recipes) > 1:
        print(f"{slug} has several recipes ({', '.join(recipes)}): this is {slug}:{first}", file=sys.stderr)
    return recipes[name or first]


def _refuse(where: str, slug: str) -> NoReturn:
    """Raise for what is neither a file nor a plugin with recipes, saying which of the two is near."""
    registry = plugins.registry()
    registry.refuse(slug, repr(slug), where)
    names = {entry.name for entry in registry.entries} | {c.name for _, _, c in registry.components()}
    problem, hint = "no such recipe", nearest(slug, [*names, *catalog.methods(), *Path().glob("*.toml")])
    if slug in names:
        problem, hint = f"{slug!r} is installed and brings no recipe", None
    elif os.path.isdir(where):
        problem = "a folder, not a recipe"
    allowed = "a path to a .toml file, or SLUG:RECIPE of an installed plugin"
    raise InputError(where, problem, allowed=allowed, hint=hint)


def _parsed(path: Path) -> tuple[str, dict[str, Any]]:
    """A file's text and tree."""
    with blame(str(path), "cannot be read"), path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(str(path), "too large for a recipe", allowed=f"at most {MAX_BYTES} bytes")
        text = raw.decode("utf-8-sig")
    with blame(str(path), "cannot be read as TOML", hint=TOML):
        return text, tomllib.loads(text)


def _origin(place: str, source: Source) -> str:
    """The override, or the file and the line, that brought what stands at a place."""
    for text in reversed(source.overrides):
        if f"{place}.".startswith(f"{text.partition('=')[0].strip()}."):
            return f"the override {text}"
    line = _line(source.text, place)
    return f"{source.path}, line {line}" if line else source.path


def _line(text: str, place: str) -> int | None:
    """The line (1-based) where the statement begins that brings the deepest part of a place that there is.

    What a TOML file begins with is a TOML file too, so its beginnings are read until one holds it.
    """
    lines, start = text.splitlines(keepends=True), 0
    while place and not _holds(text, place):
        place = place.rpartition(".")[0]
    if not place or len(lines) * len(text) > MAX_READ:
        return None
    for end in range(1, len(lines) + 1):
        try:
            if _holds("".join(lines[:end]), place):
                return start + 1
            start = end
        except ValueError:  # the end of the statement is still to come
            continue
    return None


def _holds(text: str, place: str) -> bool:
    return any(f"{leaf}.".startswith(f"{place}.") for leaf, _ in leaves(tomllib.loads(text)))
