"""``check_plugin``: every check on everything that a plugin offers, installed or in a folder; for pytest too."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kdcore import catalog, kinds, plugins, recipe
from kdcore.errors import InputError, nearest
from kdcore.hookspecs import GROUP, HOOKS
from kdcore.testing import contract, losses, models  # noqa: F401 - they register their checks
from kdcore.testing.findings import Failed, Finding, Skipped, check, checks_of, examine, excused
from kdcore.testing.oracle import check_oracle, oracles_of
from kdcore.testing.subjects import Subject
from kdcore.types import Component

_METHODS = {"stage": "run", "probe": "measure", "exporter": "export"}  # kinds that need no base class
_LIGHT = """
import importlib, sys
module = importlib.import_module(sys.argv[1])
for name in sys.argv[2].split(","):
    list(getattr(module, name, tuple)() or ())
print(",".join(sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[3].split(",")))))
"""


@dataclass
class Plugin:
    """An installed plugin, as its own checks see it."""

    entry: plugins.Entry
    folder: Path | None = None
    components: list[tuple[str, Component]] = field(default_factory=list)
    fault: plugins.Fault | None = None

    @property
    def slug(self) -> str:
        return self.entry.name

    @cached_property
    def recipes(self) -> list[Path]:
        return recipe.recipes_of(self.slug) if self.entry.distribution != GROUP else []


def check_plugin(where: str | os.PathLike[str], *, expected_failures: Mapping[str, str] | None = None) -> list[Finding]:
    """The findings of every check on a plugin: by its slug, or a folder with a pyproject.toml, installed or not.

    ``expected_failures`` maps checks to reasons: their failures are skipped, and one that passes is a failure;
    a component may carry such a mapping as an attribute of its own.
    Raises InputError where there is no such plugin.
    """
    with _opened(where) as plugin:
        return excused(_findings(plugin), expected_failures or {}, plugin.slug)


def parametrize(where: str | os.PathLike[str], *, expected_failures: Mapping[str, str] | None = None) -> Any:
    """A pytest decorator: one case a check and component, as the argument ``check``; call it.

    ::

        @kdcore.testing.parametrize("my-method", expected_failures={"direction": "pushes away by design"})
        def test_conformance(check):
            check()
    """
    import pytest

    found: list[Finding] = []

    def case(name: str, component: str) -> Callable[[], Finding]:
        def run() -> Finding:
            if not found:
                found.extend(check_plugin(where, expected_failures=expected_failures))
            finding = next(f for f in found if (f.check, f.component) == (name, component))
            assert not finding.failed, str(finding)
            return finding

        return run

    with _opened(where) as plugin:
        names = [(c.name, plugin.slug) for c in checks_of("plugin")]
        for kind, component in plugin.components:
            names += [(c.name, _title(kind, component)) for c in [*checks_of("component"), *checks_of(kind)]]
    return pytest.mark.parametrize("check", [pytest.param(case(*n), id=f"{n[1]}-{n[0]}") for n in names])


def _findings(plugin: Plugin) -> list[Finding]:
    found = examine("plugin", plugin, plugin.slug)
    with tempfile.TemporaryDirectory() as folder:
        for kind, component in plugin.components:
            subject = Subject(plugin.entry, kind, component, plugin.recipes, Path(folder))
            mine = examine("component", subject, _title(kind, component))
            broken = next((f for f in mine if f.failed and f.check in ("imports", "kind", "schema")), None)
            if broken is None:
                mine += examine(kind, subject, _title(kind, component))
            else:
                why = f"{broken.check} failed: mend that first"
                mine += [Finding(c.name, broken.component, "skipped", why) for c in checks_of(kind)]
            expected = getattr(subject.target, "expected_failures", {}) if broken is None else {}
            found += excused(mine, expected, subject.name)
    return found


def _title(kind: str, component: Component) -> str:
    return f"{kind} {component.name}"


# ---- finding the plugin -------------------------------------------------------------------------------


@contextmanager
def _opened(where: str | os.PathLike[str]) -> Iterator[Plugin]:
    folder = Path(where)
    with _installed(folder) if (folder / "pyproject.toml").is_file() else nullcontext(os.fspath(where)) as slug:
        registry = plugins.registry()
        entry = next((e for e in registry.entries if slug in (e.name, e.distribution)), None)
        if entry is None:
            names = [e.name for e in registry.entries]
            raise InputError(os.fspath(where), "no such plugin, and no folder with a pyproject.toml", hint=nearest(slug, names))
        offered = [(kind, c) for kind, e, c in registry.components() if e == entry]
        fault = next((f for f in registry.quarantine if f.entry == entry), None)
        yield Plugin(entry, folder.resolve() if folder.is_dir() else None, offered, fault)


@contextmanager
def _installed(folder: Path) -> Iterator[str]:
    """The plugin in a folder as if installed: its metadata on the path, which discovery reads as any other."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8")).get("project", {})
    except tomllib.TOMLDecodeError as error:
        raise InputError(str(folder / "pyproject.toml"), f"not valid TOML: {error}") from None
    points = project.get("entry-points", {}).get(GROUP, {})
    if not points:
        raise InputError(str(folder), f'no entry point in the group "{GROUP}"', hint="kd plugin new writes one")
    name, slug = project.get("name", folder.name), next(iter(points))
    with tempfile.TemporaryDirectory() as scratch:
        info = Path(scratch) / f"{name.replace('-', '_')}-0.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {each}\n" for each in project.get("dependencies", []))
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n{needs}", "utf-8")
        rows = "".join(f"{key} = {value}\n" for key, value in points.items())
        info.joinpath("entry_points.txt").write_text(f"[{GROUP}]\n{rows}", "utf-8")
        paths, modules = [scratch, str(folder.resolve()), str(folder.resolve() / "src")], [*points.values()]
        sys.path[:0] = paths
        _forget(modules)
        try:
            yield slug
        finally:
            sys.path[:] = [each for each in sys.path if each not in paths]
            _forget(modules)


def _forget(modules: list[str]) -> None:
    """A registry and modules of another place must not answer for this one."""
    for name in [n for n in sys.modules if n.partition(".")[0] in {m.partition(".")[0] for m in modules}]:
        del sys.modules[name]
    importlib.invalidate_caches()
    plugins.registry.cache_clear()


# ---- checks of the whole ------------------------------------------------------------------------------


@check("plugin", after=())
def naming(p: Plugin) -> None:
    """One slug gives every name, so that an error, a recipe and pip speak of the same thing. Do: folder SLUG,
    distribution kd-plugin-SLUG (or kd-exporter-SLUG), module kd_plugin_SLUG with underscores, entry point SLUG."""
    if p.entry.distribution == GROUP:
        raise Skipped("the core itself")
    base = next((b for b in ("kd-plugin", "kd-exporter") if p.entry.distribution.startswith(b)), "kd-plugin")
    module = p.entry.target.partition(".")[0]
    wanted = {"distribution": f"{base}-{p.slug}", "module": f"{base}-{p.slug}".replace("-", "_")}
    found = {"distribution": p.entry.distribution, "module": module}
    if p.folder is not None and p.folder.parent.name in ("plugins", "exporters"):
        wanted["folder"], found["folder"] = p.slug, p.folder.name
    if wrong := [f"{key} {found[key]!r}, not {wanted[key]!r}" for key in wanted if found[key] != wanted[key]]:
        raise Failed(f"slug {p.slug!r}: {'; '.join(wrong)}")


@check("plugin", after=())
def light_import(p: Plugin) -> None:
    """Every `kd list` imports every plugin's entry-point module. Do: import torch and the like in the component's own
    module, which the target names."""
    path = os.pathsep.join([str(p.folder), *sys.path] if p.folder else sys.path)
    command = [sys.executable, "-c", _LIGHT, p.entry.target, ",".join(HOOKS), ",".join(plugins.HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode:
        raise Failed(f"cannot be imported: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    if heavy := done.stdout.strip():
        raise Failed(f"importing {p.entry.target} imports {heavy}")


@check("plugin", after=("light_import",))
def loads(p: Plugin) -> None:
    """A plugin in quarantine offers nothing. Do: mend what the phase's error names."""
    if p.fault is not None:
        raise Failed(f"in quarantine ({p.fault.phase}): {p.fault.error}")
    if not p.components:
        raise Failed("its hooks answer with no component")


@check("plugin", after=("light_import", "loads"))
def oracle(p: Plugin) -> None:
    """A method whose numbers nobody has checked against its paper may be another method. Do: list oracles as ORACLES in
    the package's oracle module (docs/testing.md), or set status = "experimental" in registry.toml."""
    found = oracles_of(p.entry.target)
    for each in found:
        check_oracle(each)
    status = (catalog.method(p.slug) or {}).get("status")
    if not found and status in ("implemented", "demonstrated"):
        raise Failed(f"the catalogue has it as {status}, and it has no oracle")
    if not found:
        raise Skipped("has no oracle: experimental")


@check("plugin", after=("light_import", "loads"))
def recipe_runs(p: Plugin) -> None:
    """The first thing that a user tries is the plugin's recipe. Do: read the error; `kd run SLUG train.steps=2` shows
    it whole."""
    from kdcore import api

    if not p.recipes:
        raise Skipped("has no recipe")
    tree = _shortened(recipe.read(p.recipes[0]).tree)
    tree["train"] = _shortened_train(tree.get("train", {}))
    with tempfile.TemporaryDirectory() as folder, api._working_folder(p.recipes[0].parent):
        api.run(tree, out=Path(folder) / "run", quiet=True)


def _shortened(tree: Any) -> Any:
    """A recipe of two steps everywhere, on the CPU, that exports nothing."""
    if isinstance(tree, list):
        return [_shortened(each) for each in tree]
    if not isinstance(tree, Mapping):
        return tree
    kept = {k: _shortened(v) for k, v in tree.items() if k not in ("export", "report")}
    return {k: _shortened_train(v) if k == "train" and isinstance(v, Mapping) else v for k, v in kept.items()}


def _shortened_train(table: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in table.items() if k not in ("epochs", "checkpoint_every")}, "steps": 2, "device": "cpu"}


# ---- checks of one component's declaration ------------------------------------------------------------


@check("component", after=())
def imports(s: Subject) -> None:
    """A target that cannot be imported fails when a recipe first names it. Do: correct the import string, or the
    dependencies in pyproject.toml."""
    try:
        plugins.load_target(s.component)
    except InputError as error:
        raise Failed(error.problem) from None


@check("component", after=("imports",))
def kind(s: Subject) -> None:
    """The core calls a component by its kind's methods. Do: derive from the class of kdcore.kinds, or for a loss write
    a plain function of tensors."""
    target = plugins.load_target(s.component)
    if s.kind in _METHODS:
        method = _METHODS[s.kind]
        if not (inspect.isclass(target) and any(callable(getattr(target, n, None)) for n in (method, f"{method}_request"))):
            raise Failed(f"a {s.kind} is a class with {method}()")
        return
    base = getattr(kinds, s.kind.capitalize())
    if inspect.isclass(target) and not issubclass(target, base):
        raise Failed(f"{target.__name__} does not derive from kdcore.kinds.{base.__name__}")
    if not inspect.isclass(target) and (s.kind != "loss" or not callable(target)):
        raise Failed(f"a {s.kind} is a class, not a {type(target).__name__}")
    reads = getattr(target, "reads", ())
    if inspect.isclass(target) and (bad := [r for r in reads if not re.fullmatch(r"(student|teacher)\.\w[\w.]*", r)]):
        raise Failed(f"reads {bad[0]!r}: neither student.NAME nor teacher.NAME")


@check("component", after=("imports",))
def schema(s: Subject) -> None:
    """Parameters are checked by their annotations before a run. Do: annotate every parameter; of a loss function the
    positional arguments are tensors, the keyword-only ones parameters."""
    found = s.schema
    _ = found.model
    if untyped := [n for n, p in found.params.items() if p.annotation is p.empty]:
        raise Failed(f"parameters without a type: {', '.join(untyped)}")
    if s.kind == "loss" and not inspect.isclass(s.target) and not found.tensors:
        raise Failed("a loss function without positional arguments gets no tensors")


@check("component", after=("imports", "schema"))
def defaults(s: Subject) -> None:
    """A default that its own annotation refuses cannot be written in a recipe. Do: correct the default or the range."""
    for name, parameter in s.schema.params.items():
        if parameter.default is not parameter.empty:
            try:
                replace(s.schema, params={name: parameter}).validate({name: parameter.default}, s.component.name)
            except InputError as error:
                raise Failed(f"{name} = {parameter.default!r}: {error.problem}") from None


@check("component", after=("imports",))
def help_text(s: Subject) -> None:
    """`kd list` and `kd show` are the manual. Do: give the Component a summary, and the class or function a docstring."""
    if not s.component.summary.strip():
        raise Failed("its Component has no summary")
    if not (s.target.__doc__ or "").strip():
        raise Failed(f"{s.component.target} has no docstring")
