"""Discovery: which plugins are installed, what they offer, and which of them are broken.

One broken plugin never stops the others: it is put in quarantine with the phase and the error, and is
fatal only to a recipe that names it. ``KD_PLUGINS`` (allow) and ``KD_DISABLE_PLUGINS`` (block) are comma
separated lists of entry-point names, applied before anything is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import pluggy

from kdcore import catalog
from kdcore.errors import InputError, cause, nearest
from kdcore.hookspecs import GROUP, HOOKS, Declarations
from kdcore.types import Component

# modules that cost a second or more to import: a plugin's entry-point module must do without them
HEAVY = ("torch", "transformers", "mmengine", "mmdet3d", "onnxruntime", "sklearn", "matplotlib", "pandas")
MOST = 1000  # components of one hook; a generator without an end is a fault, not a hang


@dataclass(frozen=True)
class Entry:
    """One entry point: the plugin's name and the distribution that brings it."""

    name: str
    distribution: str
    version: str
    target: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """Why a plugin is in quarantine. Phases: import, light, hooks, declare, version."""

    entry: Entry
    phase: str
    error: str


@dataclass
class Registry:
    """What is installed. ``offers[kind][name]`` lists every (entry, component) of that name."""

    entries: list[Entry] = field(default_factory=list)
    quarantine: list[Fault] = field(default_factory=list)
    blocked: list[Entry] = field(default_factory=list)
    offers: dict[str, dict[str, list[tuple[Entry, Component]]]] = field(default_factory=dict)

    def components(self, kind: str | None = None) -> Iterator[tuple[str, Entry, Component]]:
        """(kind, entry, component), sorted by name."""
        for each in [kind] if kind else list(HOOKS.values()):
            for _, found in sorted(self.offers.get(each, {}).items()):
                for entry, component in found:
                    yield each, entry, component

    def find(self, kind: str, name: str, place: str = "use") -> tuple[Entry, Component]:
        """The component ``name`` (or ``distribution:name``) of a kind, or an error that says what to do."""
        distribution, _, bare = name.rpartition(":")
        found = self.offers.get(kind, {}).get(bare, [])
        if distribution:
            found = [(e, c) for e, c in found if e.distribution == distribution]
        if len(found) == 1:
            return found[0]
        if found:
            full = [f"{e.distribution}:{bare}" for e, _ in found]
            raise InputError(
                place, f"{kind} {name!r} is offered by {len(found)} plugins", given=name, allowed=full
            )
        raise self._missing(kind, name, bare, place)

    def trouble(self, slug: str) -> str:
        """Why an installed plugin of this name cannot be used: quarantine or block; empty where it can."""
        for fault in self.quarantine:
            if fault.entry.name == slug:
                return f"plugin {fault.entry.distribution} is in quarantine ({fault.phase}): {fault.error}"
        if any(entry.name == slug for entry in self.blocked):
            return f"plugin {slug!r} is blocked by KD_PLUGINS or KD_DISABLE_PLUGINS"
        return ""

    def _missing(self, kind: str, name: str, bare: str, place: str) -> InputError:
        slug = bare.split(".")[0]
        if reason := self.trouble(slug):
            hint = "unset the variable" if "KD_" in reason else "kd plugins shows it; mend or uninstall it"
            return InputError(place, f"{kind} {name!r}: {reason}", given=name, hint=hint)
        names = sorted(self.offers.get(kind, {}))
        others = [k for k, offered in self.offers.items() if bare in offered]
        if others:
            return InputError(place, f"{name!r} is a {others[0]}, not a {kind}", given=name, allowed=names)
        if not any(entry.name == slug for entry in self.entries) and (known := catalog.method(slug)):
            return InputError(
                place, f"{kind} {name!r} is not installed", given=name, hint=catalog.how_to_get(known)
            )
        return InputError(
            place,
            f"unknown {kind} {name!r}",
            given=name,
            allowed=names,
            hint=nearest(name, [*names, *catalog.slugs()]),
        )


@cache
def registry() -> Registry:
    """The registry of this environment, made once a process."""
    return discover(_entry_points())


def discover(entries: Iterable[Entry]) -> Registry:
    """Load each entry on its own and index what it declares."""
    found, manager = Registry(offers={kind: {} for kind in HOOKS.values()}), pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Declarations)
    allow, block = _names("KD_PLUGINS"), _names("KD_DISABLE_PLUGINS") or frozenset()
    for entry in sorted(entries, key=lambda e: (e.distribution != GROUP, e.name, e.distribution)):
        if entry.distribution != GROUP and (
            entry.name in block or (allow is not None and entry.name not in allow)
        ):
            found.blocked.append(entry)
            continue
        found.entries.append(entry)
        declared = _load(entry, manager)
        if isinstance(declared, Fault):
            found.quarantine.append(declared)
            continue
        for kind, component in declared:
            found.offers[kind].setdefault(component.name, []).append((entry, component))
    return found


def load_target(component: Component, place: str = "use") -> Any:
    """The class or function that a component's target names. Imports the plugin's heavy code."""
    module, _, attribute = component.target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a plugin's import may raise anything
        why = f"{component.name!r}: cannot import {component.target!r}: {cause(error)}"
        raise InputError(place, why, hint="reinstall the plugin, or install what the error names") from error


def _names(variable: str) -> frozenset[str] | None:
    text = os.environ.get(variable)
    return None if text is None else frozenset(name.strip() for name in text.split(",") if name.strip())


def _entry_points() -> list[Entry]:
    return list(dict.fromkeys(_entry(point) for point in importlib.metadata.entry_points(group=GROUP)))


def _entry(point: importlib.metadata.EntryPoint) -> Entry:
    """What the metadata say; a damaged installation still has a name, so that it can be pointed at."""
    try:
        assert point.dist is not None
        name = re.sub(r"[-_.]+", "-", point.dist.metadata["Name"]).lower()
        return Entry(point.name, name, point.dist.version, point.value, tuple(point.dist.requires or ()))
    except Exception:
        return Entry(point.name, "unknown", "unknown", point.value)


def _load(entry: Entry, manager: pluggy.PluginManager) -> list[tuple[str, Component]] | Fault:
    phase = "version"
    try:
        _check_version(entry)
        phase = "import"
        with _without_heavy_imports(), redirect_stdout(sys.stderr):  # --json must stay JSON
            module = importlib.import_module(entry.target)
        phase = "light"
        if heavy := _heavy_names(module):
            raise ImportError(f"the module holds {heavy}: import it inside the component's own module")
        phase = "hooks"
        name = f"{entry.distribution}:{entry.name}"
        manager.register(module, name)
        try:
            manager.check_pending()
            if misspelt := _misspelt(module):
                raise ValueError(f"no such hook: {misspelt}. {nearest(misspelt, HOOKS) or ''}")
            phase = "declare"
            return _declarations(entry, module)
        except BaseException:
            manager.unregister(name=name)
            raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin that exits must not end the program
        return Fault(entry, phase, cause(error))


def _check_version(entry: Entry) -> None:
    """Raise where the plugin states a range of kdcore (and a marker that applies) that this one is not in."""
    from kdcore import __version__

    for text in entry.requires:
        at_least = re.fullmatch(r"kdcore\s*\(?>=\s*(\d+(?:\.\d+)*)\)?", text)
        if at_least and _numbers(at_least[1]) <= _numbers(__version__):
            continue  # what nearly every plugin says: packaging takes 40 ms to import
        if re.match(r"kdcore\b(?![-.])", text):
            from packaging.requirements import Requirement

            needed = Requirement(text)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if applies and not needed.specifier.contains(__version__, prereleases=True):
                raise RuntimeError(f"needs kdcore{needed.specifier}, this is {__version__}")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


@contextmanager
def _without_heavy_imports() -> Iterator[None]:
    """Refuse the heavy modules while a light module is imported, so that listing stays quick."""

    class Refuse:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if _top(name) in HEAVY:
                raise ImportError(
                    f"imports {name} at module level: a plugin's entry-point module must be light"
                )

    sys.meta_path.insert(0, Refuse)
    try:
        yield
    finally:
        sys.meta_path.remove(Refuse)


def _heavy_names(module: Any) -> str:
    """A heavy module among the globals: how it shows when torch was already imported by somebody else.

    What comes from another module of the plugin, or of kdcore, is heavy where that module holds a heavy one.
    """
    near = (module.__name__.partition(".")[0], GROUP)
    for owner in _owners(module):
        inner = _owners(sys.modules[owner]) if _top(owner) in near and owner in sys.modules else ()
        if _top(owner) in HEAVY or any(_top(each) in HEAVY for each in inner):
            return owner
    return ""


def _owners(module: Any) -> Iterator[str]:
    """The modules that a module's globals are, or come from."""
    for name, value in list(vars(module).items()):
        owner = value.__name__ if type(value) is type(sys) else getattr(value, "__module__", None)
        # a submodule hangs in its package as soon as anybody imports it: that says nothing of the package
        if isinstance(owner, str) and owner not in (module.__name__, f"{module.__name__}.{name}", GROUP):
            yield owner


def _top(name: str) -> str:
    return name.partition(".")[0]


def _misspelt(module: Any) -> str:
    """A name that looks like a hook and is none, marked or not."""
    public = (n for n, v in vars(module).items() if n.startswith("kd_") and callable(v))
    return next((name for name in public if name not in HOOKS), "")


def _declarations(entry: Entry, module: Any) -> list[tuple[str, Component]]:
    rows: list[tuple[str, Component]] = []
    for hook, kind in HOOKS.items():
        function = getattr(module, hook, None)
        if function is None:
            continue
        if not hasattr(function, f"{GROUP}_impl"):
            raise TypeError(f"{hook} is not marked with @hookimpl")
        with redirect_stdout(sys.stderr):
            found = list(islice(function() or (), MOST + 1))
        if len(found) > MOST:
            raise ValueError(f"{hook} gives more than {MOST} components")
        rows += [(kind, _checked(entry, hook, component)) for component in found]
    names = [(kind, component.name) for kind, component in rows]
    if doubled := {name for kind, name in names if names.count((kind, name)) > 1}:
        raise ValueError(f"declared twice: {', '.join(sorted(doubled))}")
    return rows


def _checked(entry: Entry, hook: str, component: Any) -> Component:
    if not isinstance(component, Component):
        raise TypeError(f"{hook} gave {component!r}, not a Component")
    if entry.distribution != GROUP and component.name.split(".")[0] != entry.name:
        raise ValueError(f"component {component.name!r} must be named {entry.name!r} or '{entry.name}.part'")
    return component
