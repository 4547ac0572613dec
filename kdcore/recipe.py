"""Recipes: TOML in, a checked recipe out. This is phase one, text and names; it imports no torch."""

from __future__ import annotations

import copy
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdcore import plugins
from kdcore.errors import InputError
from kdcore.signature import _in_words
from kdcore.tables import Recipe, StageTable, Use

MAX_BYTES = 1_000_000
NESTED_TABLES = ("student", "teacher", "router", "augmentation", "task", "loss", "data", "train", "report", "probe")


@dataclass(frozen=True)
class Source:
    """A recipe's text as it was read, with the folder that its relative paths start from."""

    tree: dict[str, Any]
    path: str = ""
    text: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.path).resolve().parent if self.path else Path.cwd()

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return Source(copy.deepcopy(self.tree), self.path, self.text)


def read(where: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()) -> Source:
    """A recipe from a file, ``slug`` or ``slug:recipe`` of an installed plugin, or a mapping; overrides applied."""
    if isinstance(where, Mapping):
        source = Source(copy.deepcopy(dict(where)))
    else:
        path = _resolve(os.fspath(where))
        text = _text(path)
        try:
            source = Source(tomllib.loads(text), str(path), text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(str(path), f"not valid TOML: {error}") from None
        source.tree.setdefault("name", path.stem)
    for override in overrides:
        _override(source.tree, override)
    return source


def check(source: Source) -> Recipe:
    """Types, ranges and names. Raises InputError with the place in the file; asks no component."""
    try:
        recipe = parse(source.tree)
        check_names(recipe)
    except InputError as error:
        raise located(error, source) from None
    return recipe


def parse(tree: Mapping[str, Any]) -> Recipe:
    if not tree.get("student"):
        empty = not set(tree) - {"name"}
        raise InputError("", "the recipe is empty" if empty else "the recipe has no [student]", hint="kd schema shows one")
    if "data" not in tree:
        raise InputError("", "the recipe has no [data]", hint='[data] with source = "package.module:callable"')
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise _in_words(error, Recipe, "", "the recipe") from None


def check_names(recipe: Recipe) -> None:
    """Every ``use`` is installed, and what refers to a teacher, a stage or a stream of the recipe exists."""
    registry = plugins.registry()
    for place, kind, table in components(recipe):
        registry.find(kind, table.use, f"{place}.use")
    if recipe.data.use == "module" and not recipe.data.source:
        raise InputError("data.source", "missing", allowed="package.module:callable")
    if recipe.train.epochs and recipe.train.steps:
        raise InputError("train", "epochs and steps are both given", hint="keep one")
    for index, loss in enumerate(recipe.loss):
        wanted = [loss.teacher] if isinstance(loss.teacher, str) else loss.teacher or []
        _known(wanted, recipe.teacher, f"loss.{index}.teacher", "teacher")
    if recipe.router:
        _known(recipe.router.teachers or [], recipe.teacher, "router.teachers", "teacher")
    names = [stage_name(stage, i) for i, stage in enumerate(recipe.stage)]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError(f"stage.{index}.name", "two stages have this name", given=name)
        parse_stage(recipe, recipe.stage[index], f"stage.{index}")


def components(recipe: Recipe) -> Iterator[tuple[str, str, Use]]:
    """(place, kind, table) of each component that the recipe names, in its order."""
    yield "student", "student", recipe.student
    for name, table in recipe.teacher.items():
        yield f"teacher.{name}", "teacher", table
    if recipe.router:
        yield "router", "router", recipe.router
    for kind in ("augmentation", "loss", "stage", "probe"):
        for index, each in enumerate(getattr(recipe, kind)):
            yield f"{kind}.{index}", kind, each
    if recipe.export:
        yield "export", "exporter", recipe.export


def parse_stage(recipe: Recipe, stage: StageTable, place: str) -> Recipe:
    """The recipe as a stage sees it: the stage's own tables laid over the recipe's."""
    over = {key: value for key, value in stage.params.items() if key in NESTED_TABLES}
    if not over:
        return recipe
    tree = merge(recipe.model_dump(exclude_unset=True), over)
    try:
        return parse({**tree, "stage": []})
    except InputError as error:
        error.place = f"{place}.{error.place}"
        raise


def stage_name(stage: StageTable, index: int) -> str:
    return stage.name or f"{index + 1}-{stage.use}"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: tables are merged, everything else (arrays too) is replaced.

    A table that names another component (``use``) replaces the old one whole.
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        out[key] = merge(old, value) if both and value.get("use", old.get("use")) == old.get("use") else value
    return out


def located(error: InputError, source: Source) -> InputError:
    """The error with the file and, where it can be found, the line of its place."""
    if source.path and not error.source:
        line = _line(source.text, error.place.split("."))
        error.source = f"{source.path}, line {line}" if line else source.path
    return error


def recipes_of(slug: str) -> list[Path]:
    """The recipes (TOML files) beside an installed plugin's entry-point module, by name."""
    import importlib.util

    entry = next((e for e in plugins.registry().entries if e.name == slug), None)
    found = importlib.util.find_spec(entry.target) if entry else None
    return sorted(Path(found.origin).parent.glob("*.toml")) if found and found.origin else []


def _resolve(where: str) -> Path:
    path = Path(where).expanduser()
    if path.is_dir():
        raise InputError(where, "a folder, not a recipe", hint="name the .toml file")
    if path.exists():
        return path
    slug, _, name = where.partition(":")
    if re.fullmatch(r"[a-z][a-z0-9-]*", slug):
        found = recipes_of(slug)
        for each in found:
            if not name or each.stem == name:
                return each
        if found:
            raise InputError(where, f"plugin {slug!r} has no recipe {name!r}", allowed=[p.stem for p in found])
        for kind in ("loss", "student", "router", "augmentation", "stage", "probe", "teacher"):
            if not path.suffix:
                plugins.registry().find(kind, slug, where)
                break
    raise InputError(where, "no such recipe file", hint="a path to a .toml file, or SLUG:RECIPE of an installed plugin")


def _text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise InputError(str(path), "too large for a recipe", given=path.stat().st_size, allowed=f"{MAX_BYTES} bytes")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        return raw.decode("utf-8")
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"not UTF-8 text: {error.reason} at byte {error.start}") from None


def _override(tree: dict[str, Any], text: str) -> None:
    """Apply ``train.epochs=5`` or ``loss.0.temperature=2`` in place; a value that is no TOML is a string."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise InputError(text, "not an override", allowed="key.path=value, for example train.epochs=5")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    node: Any = tree
    steps = path.strip().split(".")
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(node, list):
            if not step.isdigit() or int(step) >= len(node):
                raise InputError(path, f"there is no number {step} here", allowed=f"0 to {len(node) - 1}")
            if last:
                node[int(step)] = parsed
            node = node[int(step)]
        elif isinstance(node, dict):
            if last:
                node[step] = parsed
            node = node.setdefault(step, {})
        else:
            raise InputError(path, f"{'.'.join(steps[:depth])} is a value, not a table", given=node)


def _known(wanted: Iterable[str], have: Mapping[str, Any], place: str, what: str) -> None:
    from kdcore.errors import nearest

    for name in wanted:
        if name not in have:
            raise InputError(place, f"no {what} of this name", given=name, allowed=list(have), hint=nearest(name, have))


def _line(text: str, steps: list[str]) -> int | None:
    """The line of the deepest part of a dotted place that can be found in the text (1-based)."""
    best, seen = None, 0
    header: list[str] = []
    counts: dict[str, int] = {}
    for number, row in enumerate(text.splitlines(), 1):
        row = row.strip()
        if match := re.match(r"\[\[?([^\]]+)\]", row):
            header = [part.strip().strip("\"'") for part in match[1].split(".")]
            if row.startswith("[["):
                key = ".".join(header)
                counts[key] = counts.get(key, -1) + 1
                header = [*header, str(counts[key])]
            here = header
        elif match := re.match(r"([\w.\"'-]+)\s*=", row):
            here = [*header, *(part.strip("\"'") for part in match[1].split("."))]
        else:
            continue
        if here == steps[: len(here)] and len(here) > seen:
            best, seen = number, len(here)
    return best
