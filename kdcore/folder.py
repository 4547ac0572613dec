"""Run folders: opened when a recipe was found right, joined on resume, never left behind without a result."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from kdcore.checkpoint import write_text
from kdcore.errors import InputError, RunError
from kdcore.source import LOCK, MADE_FROM, Source, leaves

PID = ".pid"  # of the process at work: for words alone, the lock is on the folder
DRAFT = re.compile(r"\.(pid|.*\.tmp)$")  # of a process that was killed while it wrote
IDENTITY = "identity"  # a file: the digest of what decides a stage or a fit that is finished
INSIDE = "$RUN/"  # how a path inside the run folder is written down, so that the folder may move
PLAIN = (str, bool, int, float, datetime.date, datetime.time)


@contextmanager
def opened(folder: Path, source: Source, resume: bool, force: bool) -> Iterator[None]:
    """The run folder for this block and this process alone: made with its recipe, or the run that is there joined.

    Where the block ends with an InputError before anything was trained, the folder is as it was before.
    """
    made, lock, tree = not folder.exists(), folder / LOCK, tomlable(source.tree)
    # where modules beside the recipe are found when the run is resumed or exported
    origin = f"{MADE_FROM}{source.folder}\n" if source.path and "\n" not in source.path else ""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
            kept = _joined(folder, tree, resume, force)
            for path in folder.rglob(".*.tmp"):
                path.unlink(missing_ok=True)
            write_text(lock, origin + tomli_w.dumps(tree))
        except (OSError, RunError) as error:
            if made:
                discard(folder)
            reason = getattr(error.__cause__ or error, "strerror", None) or error
            raise InputError(str(folder), f"cannot be written: {reason}", hint="name another --out") from None
        try:
            yield
        except InputError:
            if made:
                discard(folder)
            elif kept:
                write_text(lock, kept)
            raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, for this process alone; the lock goes with the process.

    Raises InputError where another process is at work in it, OSError or RunError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, note = os.open(folder, os.O_RDONLY), folder / PID
    try:
        _take(lock, note)
        try:
            write_text(note, str(os.getpid()))
            yield
        finally:
            with suppress(OSError):
                note.unlink()
    finally:
        os.close(lock)


def _take(lock: int, note: Path) -> None:
    """The lock, where the system and the file system have such locks."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = note.read_text("utf-8") if note.exists() else "unknown"
            problem, hint = (
                f"another run is at work here, process {pid}",
                "wait for it, or name another --out",
            )
            raise InputError(str(note.parent), problem, hint=hint) from None
        except OSError:
            pass


def discard(folder: Path) -> None:
    """Remove a run folder in which nothing was trained or found yet (the engine's logs do not count)."""
    with suppress(OSError):
        files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        if not [p for p in files if p.name not in (LOCK, PID) and "engine" not in p.parts]:
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


def _joined(folder: Path, now: Mapping[str, Any], resume: bool, force: bool) -> str:
    """The recipe of the run that may be joined here, as text; empty where there is none and one may be begun."""
    try:
        text = (folder / LOCK).read_text("utf-8")
        changed = difference(tomllib.loads(text), now)
    except FileNotFoundError:
        if any(not DRAFT.match(path.name) for path in folder.iterdir()):
            raise InputError(str(folder), "not empty, and no run folder", hint="name another --out") from None
        return ""
    except ValueError:
        raise InputError(f"{folder / LOCK}", "damaged: it is no TOML", hint="name another --out") from None
    if not resume:
        raise InputError(str(folder), "this folder holds a run already", hint="--resume, or another --out")
    finished = (folder / "results.json").exists()
    if changed and (finished or not force):
        problem = f"the recipe changed since the run began: {changed}"
        raise InputError(
            str(folder), problem, hint=f"undo it, or {'another --out' if finished else '--force'}"
        )
    return text


def same_recipe(folder: Path, identity: str) -> None:
    """InputError where another recipe made what is finished in ``folder``: it would be kept as this one's."""
    path = folder / IDENTITY
    if path.exists() and path.read_text("utf-8") != identity:
        raise InputError(str(folder), "is finished, and by another recipe", hint="name another --out")
