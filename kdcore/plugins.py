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
from types import ModuleType
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
    """Why a plugin is in quarantine. Phases: version, import, hooks, declare."""

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
        offered = self.offers.get(kind, {})
        found = [each for each in offered.get(bare, []) if distribution in ("", each[0].distribution)]
        if len(found) == 1:
            return found[0]
        if found:
            full = [f"{entry.distribution}:{bare}" for entry, _ in found]
            problem = f"{kind} {name!r} is offered by {len(found)} plugins"
            raise InputError(place, problem, given=name, allowed=full)
        if trouble := self.trouble(bare.partition(".")[0]):
            why, remedy = trouble
            raise InputError(place, f"{kind} {name!r} {why}", given=name, hint=remedy)
        if others := [other for other, names in self.offers.items() if bare in names]:
            problem = f"{name!r} is {_article(others[0])}, not {_article(kind)}"
            raise InputError(place, problem, given=name, allowed=sorted(offered), hint=f"kd show {name}")
        hint = _parts(bare, offered) or nearest(name, [*offered, *catalog.methods()])
        raise InputError(place, f"unknown {kind} {name!r}", given=name, allowed=sorted(offered), hint=hint)

    def trouble(self, slug: str) -> tuple[str, str] | None:
        """Why a plugin that is known by this name cannot be used here, and what to do about it."""
        for fault in self.quarantine:
            if fault.entry.name == slug:
                why = f"is in quarantine ({fault.phase}): {fault.error}"
                return why, "kd plugins shows it; mend or uninstall it"
        if any(entry.name == slug for entry in self.blocked):
            return "is blocked by KD_PLUGINS or KD_DISABLE_PLUGINS", "unset the variable"
        if (known := catalog.method(slug)) and all(entry.name != slug for entry in self.entries):
            return "is not installed", catalog.how_to_get(known)
        return None


@cache
def registry() -> Registry:
    """The registry of this environment, made once a process."""
    return discover(_entry_points())


def discover(entries: Iterable[Entry]) -> Registry:
    """Load each entry on its own and index what it declares."""
    found = Registry(offers={kind: {} for kind in HOOKS.values()})
    allow, block = _names("KD_PLUGINS"), _names("KD_DISABLE_PLUGINS") or []
    with _only_light():
        for entry in sorted(entries, key=lambda e: (e.distribution != GROUP, e.name, e.distribution)):
            allowed = entry.name not in block and (allow is None or entry.name in allow)
            if not allowed and entry.distribution != GROUP:
                found.blocked.append(entry)
                continue
            found.entries.append(entry)
            declared = _load(entry)
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


def _names(variable: str) -> list[str] | None:
    text = os.environ.get(variable)
    return None if text is None else [name.strip() for name in text.split(",")]


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


def _load(entry: Entry) -> list[tuple[str, Component]] | Fault:
    """(kind, component) of all that a plugin declares, or why it cannot be used."""
    phase = "version"
    try:
        _check_version(entry)
        with redirect_stdout(sys.stderr):  # --json must stay JSON
            phase = "import"
            module = importlib.import_module(entry.target)
            phase = "hooks"
            hooks = _hooked(module)
            phase = "declare"
            return _declared(entry, hooks)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin that exits must not end the program
        name = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if None in (sys.modules.get(name, name), sys.modules.get(name.partition(".")[0], name)):
            return Fault(entry, phase, f"imports {name}: import it inside the component's own module")
        return Fault(entry, phase, cause(error))


def _check_version(entry: Entry) -> None:
    """Raise where the plugin states a range of kdcore (and a marker that applies) that this one is not in."""
    from kdcore import __version__

    for text in entry.requires:
        if re.match(r"kdcore\b(?![-.])", text):
            from packaging.requirements import Requirement  # takes 30 ms

            needed = Requirement(text)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if applies and not needed.specifier.contains(__version__, prereleases=True):
                raise RuntimeError(f"needs kdcore{needed.specifier}, this is {__version__}")


@contextmanager
def _only_light() -> Iterator[None]:
    """Heavy modules, and those of kdcore that hold torch, cannot be imported here, also if they were before.

    An import fails where ``sys.modules`` has None. So what is found to be wrong with a plugin, and what it costs
    to list it, never depends on what else the program has imported.
    """
    hidden = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in HEAVY or (name.startswith("kdcore.") and hasattr(module, "torch"))
    }
    sys.modules.update(dict.fromkeys([*HEAVY, *hidden]))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in HEAVY:
            del sys.modules[name]
        sys.modules.update(hidden)


def _hooked(module: ModuleType) -> pluggy.HookRelay:
    """The module's hooks, checked by pluggy; what looks like a hook must be one."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Declarations)
    manager.register(module)
    manager.check_pending()
    hooks = {caller.name for caller in manager.get_hookcallers(module) or ()}
    for name, value in list(vars(module).items()):
        if name.startswith("kd_") and callable(value) and name not in hooks:
            hint = nearest(name, set(HOOKS) - {name}) or ""
            raise ValueError(f"{name} is no hook, or is not marked with @hookimpl. {hint}")
    return manager.hook


def _declared(entry: Entry, hooks: pluggy.HookRelay) -> list[tuple[str, Component]]:
    rows: list[tuple[str, Component]] = []
    for hook, kind in HOOKS.items():
        for answer in getattr(hooks, hook)():
            found = list(islice(answer, MOST + 1))
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


def _parts(word: str, offered: Iterable[str]) -> str | None:
    """``dkd`` may mean ``classics.dkd``, and a slug any of its parts."""
    meant = [name for name in sorted(offered) if "." in name and word in name.split(".")]
    return f"did you mean {' or '.join(map(repr, meant[:6]))}?" if meant else None


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'ae' else 'a'} {kind}"
