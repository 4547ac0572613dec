"""A recipe's text: found, read, overridden from the command line, and its places found again as lines."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcore import catalog, plugins
from kdcore.errors import InputError, cause, nearest
from kdcore.hookspecs import GROUP

MAX_BYTES = 1_000_000
LOCK = "recipe.lock.toml"  # a run folder's copy of its recipe; its first line says where the recipe stood
MADE_FROM = "# made from a recipe in "
_KEY = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_HEADER = re.compile(rf"(\[\[?)\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*\]\]?\s*(?:#.*)?")
_VALUE = re.compile(rf"({_KEY}(?:\s*\.\s*{_KEY})*)\s*=")


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
        path = _resolve(os.fspath(where))
        text = _text(path)
        try:
            source = Source(tomllib.loads(text), str(path), text, given)
        except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
            raise InputError(str(path), f"not valid TOML: {cause(error)}") from None
        source.tree.setdefault("name", _title(path.stem))
    for text in given:
        override(source.tree, text)
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
    line = _line(source.text, steps)
    error.source = f"{source.path}, line {line}" if line else source.path
    return error


def recipes_of(slug: str) -> list[Path]:
    """The recipes (TOML files) beside an installed plugin's entry-point module, by name."""
    found: set[Path] = set()
    for entry in plugins.registry().entries:
        if entry.name == slug and entry.distribution != GROUP:
            folders = _package_folders(entry.target)
            found |= {path for folder in folders for path in Path(folder).glob("*.toml")}
    return sorted(found)


def _package_folders(module: str) -> list[str]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # a plugin in quarantine may be anything
        return []
    return list(spec.submodule_search_locations or []) if spec else []


def _resolve(where: str) -> Path:
    try:
        path = Path(where).expanduser()
        folder = path.is_dir()
        if path.exists() and not folder:
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(where, f"not a usable path: {cause(error)}") from None
    slug, _, name = where.partition(":")
    for each in recipes_of(slug):
        if not name or each.stem == name:
            return each
    if folder:
        raise InputError(where, "a folder, not a recipe", hint="name the .toml file")
    raise _no_recipe(where, slug, name)


def _no_recipe(where: str, slug: str, name: str) -> InputError:
    """What to say of a name that is neither a file nor a plugin's recipe."""
    registry = plugins.registry()
    if reason := registry.trouble(slug):
        return InputError(where, reason, hint="kd plugins shows it")
    names = [path.stem for path in recipes_of(slug)]
    if names:
        return InputError(
            where, f"plugin {slug!r} has no recipe {name!r}", allowed=names, hint=nearest(name, names)
        )
    if any(entry.name == slug for entry in registry.entries) or any(
        slug in offered for offered in registry.offers.values()
    ):
        return InputError(
            where, f"{slug!r} is installed and brings no recipe", hint="name a .toml file that uses it"
        )
    if known := catalog.method(slug):
        return InputError(where, f"{slug!r} is not installed", hint=catalog.how_to_get(known))
    near = nearest(where, [*(entry.name for entry in registry.entries), *catalog.slugs()])
    help_text = near or nearest(where, (str(path) for path in Path().glob("*.toml")))
    return InputError(
        where,
        "no such recipe",
        allowed="a path to a .toml file, or SLUG:RECIPE of an installed plugin",
        hint=help_text,
    )


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(str(path), "too large for a recipe", allowed=f"at most {MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"not UTF-8 text: {error.reason} at byte {error.start}") from None


def _title(stem: str) -> str:
    """A file's name as a run's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).lstrip("-_.")[:80] or "run"


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return copy.deepcopy(dict(tree))
    except Exception as error:
        raise InputError("", f"the recipe cannot be copied: {cause(error)}") from None


def override(tree: dict[str, Any], text: str) -> None:
    """Apply ``train.epochs=5`` or ``loss.0.temperature=2`` in place; a value that is no TOML is a string."""
    path, equals, value = text.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps):
        raise InputError(text, "not an override", allowed="key.path=value, for example train.epochs=5")
    node: Any = tree
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        key: Any = step
        if isinstance(node, list):
            key = _position(step, len(node), path)
        elif not isinstance(node, dict):
            raise InputError(path, f"{'.'.join(steps[:depth])} is a value, not a table", given=node)
        if last:
            node[key] = _value(value)
        else:
            node = node[key] if isinstance(node, list) else node.setdefault(key, {})


def _position(step: str, length: int, path: str) -> int:
    found = int(step) if step.isascii() and step.isdigit() and len(step) < 10 else length
    if found >= length:
        allowed = f"0 to {length - 1}" if length else "none: the array is empty"
        raise InputError(path, f"there is no number {step} here", allowed=allowed)
    return found


def _value(text: str) -> Any:
    try:
        tree = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return tree["v"] if len(tree) == 1 else text


def _line(text: str, steps: list[str]) -> int | None:
    """The line of the deepest part of a dotted place that can be found in the text (1-based)."""
    best, seen = None, 0
    header: list[str] = []
    counts: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(text.splitlines(), 1):
        row = row.strip()
        if match := _HEADER.fullmatch(row):
            here = header = _header(_parts(match[2]), match[1] == "[[", counts)
        elif match := _VALUE.match(row):
            here = [*header, *_parts(match[1])]
        else:
            continue
        if here == steps[: len(here)] and len(here) > seen:
            best, seen = number, len(here)
    return best


def _header(parts: list[str], double: bool, counts: dict[tuple[str, ...], int]) -> list[str]:
    """The place of a header: with the number of each array's table that it stands in."""
    here: list[str] = []
    for index, part in enumerate(parts):
        here.append(part)
        key = tuple(here)
        if double and index == len(parts) - 1:
            counts[key] = counts.get(key, -1) + 1
        if key in counts:
            here.append(str(counts[key]))
    return here


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_KEY, dotted)]
