"""Discovery: which plugins are installed, what they offer, and which of them are broken.

One broken plugin never stops the others: it is put in quarantine with the phase and the error, and is
fatal only to a recipe that names it; so is one that takes a name of the core's own components. ``KD_PLUGINS``
(allow) and ``KD_DISABLE_PLUGINS`` (block) are comma separated lists of entry-point names, applied before
anything is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from types import ModuleType

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
    """What is installed. ``offers[kind][name]`` lists every (entry, component) of that name; ``seconds``: to import."""

    entries: list[Entry] = field(default_factory=list)
    quarantine: list[Fault] = field(default_factory=list)
    blocked: list[Entry] = field(default_factory=list)
    offers: dict[str, dict[str, list[tuple[Entry, Component]]]] = field(default_factory=dict)
    seconds: dict[Entry, float] = field(default_factory=dict)

    def components(self, kind: str | None = None) -> Iterator[tuple[str, Entry, Component]]:
        """(kind, entry, component), sorted by name."""
        for each in [kind] if kind else list(HOOKS.values()):
            for _, found in sorted(self.offers.get(each, {}).items()):
                for entry, component in found:
                    yield each, entry, component

    def clashes(self) -> Iterator[tuple[Entry, str]]:
        """Each plugin that shares the name of a component with others, and what a recipe must write instead."""
        for kind, entry, component in self.components():
            if (count := len(self.offers[kind][component.name])) > 1:
                name, full = component.name, f"{entry.distribution}:{component.name}"
                yield entry, f"{kind} {name!r} is offered by {count} plugins: write {full} for this one's"

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
        self.refuse(bare.partition(".")[0], f"{kind} {name!r}", place)
        problem = f"unknown {kind} {name!r}"
        hint = nearest(name, [*offered, *catalog.methods()]) or f"kd list --kind {kind}"
        if kinds := [each for each, names in self.offers.items() if bare in names]:
            problem, hint = f"{name!r} is of kind {' or '.join(kinds)}, not {kind}", f"kd show {name}"
        raise InputError(place, problem, given=name, allowed=sorted(offered), hint=hint)

    def refuse(self, slug: str, what: str, place: str) -> None:
        """Raise where a plugin is known by this name and cannot be used here, saying what to do about it."""
        for fault in self.quarantine:
            if fault.entry.name == slug:
                problem = f"{what} is in quarantine ({fault.phase}): {fault.error}"
                raise InputError(place, problem, hint="kd plugins shows it; mend or uninstall it")
        if any(entry.name == slug for entry in self.blocked):
            problem = f"{what} is blocked by KD_PLUGINS or KD_DISABLE_PLUGINS"
            raise InputError(place, problem, hint="unset the variable")
        if (known := catalog.method(slug)) and all(entry.name != slug for entry in self.entries):
            raise InputError(place, f"{what} is not installed", hint=catalog.how_to_get(known))


@cache
def registry() -> Registry:
    """The registry of this environment, made once a process."""
    return discover(_entry_points())


def discover(entries: Iterable[Entry]) -> Registry:
    """Load each entry on its own and index what it declares."""
    found = Registry(offers={kind: {} for kind in HOOKS.values()})
    allow, block = (os.environ.get(name) for name in ("KD_PLUGINS", "KD_DISABLE_PLUGINS"))
    with _only_light():
        for entry in sorted(entries, key=lambda e: (e.distribution != GROUP, e.name, e.distribution)):
            allowed = (allow is None or entry.name in _names(allow)) and entry.name not in _names(block or "")
            if allowed or entry.distribution == GROUP:
                found.entries.append(entry)
                _load(entry, found)
            else:
                found.blocked.append(entry)
    known = [entry.name for entry in (*found.entries, *found.blocked)]
    for name in {*_names(allow or ""), *_names(block or "")} - {"", *known}:
        words = "KD_PLUGINS or KD_DISABLE_PLUGINS names a plugin that is not installed"
        print(f"{words}: {name!r}. {nearest(name, known) or ''}".rstrip(), file=sys.stderr)
    return found


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


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


def _load(entry: Entry, registry: Registry) -> None:
    """Index what an entry declares, or put it in quarantine."""
    phase, begin = "version", time.perf_counter()
    try:
        _check_version(entry)
        begin = time.perf_counter()
        with _undone():
            phase = "import"
            module = importlib.import_module(entry.target)
            phase = "hooks"
            hooks = _hooked(module)
            phase = "declare"
            for kind, component in _declared(entry, hooks, registry):
                registry.offers[kind].setdefault(component.name, []).append((entry, component))
    except KeyboardInterrupt:
        way = f"KD_DISABLE_PLUGINS={entry.name} leaves it out"
        print(f"stopped while the plugin {entry.name!r} was imported: {way}", file=sys.stderr)
        raise
    except BaseException as error:  # SystemExit too: a plugin that exits must not end the program
        name, why = error.name or "" if isinstance(error, ModuleNotFoundError) else "", cause(error)
        if None in (sys.modules.get(name, name), sys.modules.get(name.partition(".")[0], name)):
            why = f"imports {name}: import it inside the component's own module"
        registry.quarantine.append(Fault(entry, phase, why))
    finally:
        registry.seconds[entry] = time.perf_counter() - begin


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
def _undone() -> Iterator[None]:
    """What a plugin prints goes to stderr (--json must stay JSON); the folder and the filters of warnings stay."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # a folder that was deleted under us
        here = os.curdir
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        try:
            yield
        finally:
            os.chdir(here)


@contextmanager
def _only_light() -> Iterator[None]:
    """Heavy modules, and those of kdcore that hold torch, cannot be imported here, also if they were before.

    An import fails where ``sys.modules`` has None. So what is found to be wrong with a plugin, and what it costs
    to list it, never depends on what else the program has imported.
    """
    hidden = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in HEAVY
        or (name.startswith("kdcore.") and any(hasattr(module, each) for each in ("torch", "Tensor", "nn")))
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
    for name, value in vars(module).items():
        if name.startswith("kd_") and callable(value) and name not in hooks:
            raise ValueError(f"{name} is not marked with @hookimpl")
    return manager.hook


def _declared(entry: Entry, hooks: pluggy.HookRelay, registry: Registry) -> list[tuple[str, Component]]:
    rows: list[tuple[str, Component]] = []
    core = {(kind, c.name) for kind, owner, c in registry.components() if owner.distribution == GROUP}
    for hook, kind in HOOKS.items():
        for answer in getattr(hooks, hook)():
            if not isinstance(answer, Iterable):
                raise TypeError(f"{hook}() gives {answer!r}, not components in a list or by yield")
            rows += [(kind, component) for component in islice(answer, MOST + 1)]
    if len(rows) > MOST:
        raise ValueError(f"declares more than {MOST} components")
    for kind, component in rows:
        if not isinstance(component, Component):
            raise TypeError(f"{component!r}, given as a {kind}, is not a Component")
        if entry.distribution != GROUP and component.name.split(".")[0] != entry.name:
            wanted = f"{entry.name!r} or '{entry.name}.part'"
            raise ValueError(f"component {component.name!r} must be named {wanted}")
        if (kind, component.name) in core:
            raise ValueError(f"{kind} {component.name!r} is the core's own: the plugin needs another name")
    counts = Counter((kind, component.name) for kind, component in rows)
    if twice := [name for (_, name), count in counts.items() if count > 1]:
        raise ValueError(f"declared twice: {', '.join(twice)}")
    return rows
