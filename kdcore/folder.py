"""Run folders: opened when a recipe was found right, joined on resume, never left behind without a result."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from kdcore.checkpoint import replacing
from kdcore.errors import InputError, RunError
from kdcore.source import LOCK, MADE_FROM, Source, leaves

DRAFT = re.compile(r"\..*\.tmp$")  # of a process that was killed while it wrote
INSIDE = "$RUN/"  # how a path inside the run folder is written down, so that the folder may move
PLAIN = (str, bool, int, float, datetime.date, datetime.time)


def open_folder(folder: Path, source: Source, resume: bool, force: bool) -> bool:
    """Make the run folder with its lock, or join the run that is there. True where there was none before."""
    lock, tree, made = folder / LOCK, tomlable(source.tree), False
    # where modules beside the recipe are found when the run is resumed or exported
    origin = f"{MADE_FROM}{source.folder}\n" if source.path and "\n" not in source.path else ""
    try:
        before = _read(lock)
        if before is not None:
            _may_join(folder, before, tree, resume, force)
        elif folder.is_dir() and not all(DRAFT.match(path.name) for path in folder.iterdir()):
            raise InputError(str(folder), "not empty, and no run folder", hint="name another --out")
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.rglob(".*.tmp"):
            path.unlink(missing_ok=True)
        with replacing(lock) as draft:
            draft.write_text(origin + tomli_w.dumps(tree), "utf-8")
    except (OSError, RunError) as error:
        if made:
            discard(folder)
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise InputError(str(folder), f"cannot be written: {reason}", hint="name another --out") from None
    return made


def discard(folder: Path) -> None:
    """Remove a run folder in which nothing was trained or found yet (the engine's logs do not count)."""
    with suppress(OSError):
        files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        if not [path for path in files if path.name != LOCK and "engine" not in path.parts]:
            shutil.rmtree(folder)


def portable(value: Any, folder: Path) -> Any:
    """Artefacts as they are written down: the run folder, and paths in it, without the place where it stands."""

    def shown(each: Any) -> Any:
        inside = isinstance(each, str | os.PathLike) and f"{each}/".startswith(f"{folder}/")
        return INSIDE + str(each).removeprefix(str(folder)).lstrip("/") if inside else each

    return _mapped(value, shown)


def placed(value: Any, folder: Path) -> Any:
    """``portable`` undone, where the run folder stands now."""

    def there(each: Any) -> Any:
        inside = isinstance(each, str) and each.startswith(INSIDE)
        return str(folder / each.removeprefix(INSIDE)) if inside else each

    return _mapped(value, there)


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Every value of nested tables and arrays changed."""
    if isinstance(tree, Mapping):
        return {key: _mapped(each, change) for key, each in tree.items()}
    return [_mapped(each, change) for each in tree] if isinstance(tree, list | tuple) else change(tree)


@contextmanager
def beside(source: Source) -> Iterator[None]:
    """Import strings of a recipe may name modules beside it, while this block runs."""
    folder = str(source.folder)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # somebody took it out already
            sys.path.remove(folder)


def tomlable(value: Any, place: str = "") -> Any:
    """A recipe given from Python as TOML can hold it; a function is named as an import string."""
    if isinstance(value, Mapping):
        rows = ((str(k), v) for k, v in value.items() if v is not None)
        return {key: tomlable(each, f"{place}.{key}".strip(".")) for key, each in rows}
    if isinstance(value, list | tuple):
        return [tomlable(each, f"{place}.{index}") for index, each in enumerate(value)]
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    raise InputError(place, "a recipe holds numbers, strings, arrays and tables", given=value)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``train.epochs: 5 -> 6; ...``: what differs, empty where nothing does."""
    old, new = dict(leaves(before)), dict(leaves(now))
    rows = ((place, old.get(place), new.get(place)) for place in sorted({*old, *new}))
    return "; ".join(f"{place}: {was!r} -> {is_now!r}" for place, was, is_now in rows if was != is_now)


def _may_join(
    folder: Path, before: dict[str, Any], now: Mapping[str, Any], resume: bool, force: bool
) -> None:
    if not resume:
        raise InputError(str(folder), "this folder holds a run already", hint="--resume, or another --out")
    if not force and (changed := difference(before, now)):
        problem = f"the recipe changed since the run began: {changed}"
        raise InputError(str(folder), problem, hint="undo it, or --force")


def _read(lock: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(lock.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise InputError(str(lock), "damaged: it is no TOML", hint="name another --out") from None
