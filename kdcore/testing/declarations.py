"""What a plugin as a whole, and each component's declaration, must be like."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcore import catalog, kinds, plugins, recipe
from kdcore.errors import InputError
from kdcore.hookspecs import GROUP, HOOKS
from kdcore.signature import import_string
from kdcore.testing.findings import Failed, Skipped, check
from kdcore.testing.opening import Plugin
from kdcore.testing.oracle import check_oracle, oracles_of
from kdcore.testing.subjects import Subject

_METHODS = {"stage": "run", "probe": "measure", "exporter": "export"}  # kinds that need no base class
_LIGHT = """
import importlib, sys
module = importlib.import_module(sys.argv[1])
for name in sys.argv[2].split(","):
    list(getattr(module, name, tuple)() or ())
print(",".join(sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[3].split(",")))))
"""


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
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", _LIGHT, p.entry.target, ",".join(HOOKS), ",".join(plugins.HEAVY)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
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
    found, entry = oracles_of(p.entry.target), catalog.method(p.slug) or {}
    for each in found:
        check_oracle(each)
    computes = entry.get("kind_of") == "method" or any(kind in ("loss", "router") for kind, _ in p.components)
    if not found and computes and entry.get("status") in ("implemented", "demonstrated"):
        raise Failed(f"the catalogue has it as {entry['status']}, and it has no oracle")
    if not found:
        raise Skipped("has no oracle: experimental" if computes else "has no oracle, and no loss or router")


@check("plugin", after=("light_import", "loads"))
def recipe_runs(p: Plugin) -> None:
    """The first thing that a user tries is the plugin's recipe. Do: read the error; `kd run SLUG train.steps=2` shows
    it whole."""
    from kdcore import api

    if not p.recipes:
        raise Skipped("has no recipe")
    tree = _shortened(recipe.read(p.recipes[0]).tree)
    tree["train"] = _shortened_train(tree.get("train", {}))
    with tempfile.TemporaryDirectory() as folder:
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
    return {
        **{k: v for k, v in table.items() if k not in ("epochs", "checkpoint_every")},
        "steps": 2,
        "device": "cpu",
    }


# ---- checks of one component's declaration ------------------------------------------------------------


@check("component", after=())
def imports(s: Subject) -> None:
    """A target that cannot be imported fails when a recipe first names it. Do: correct the import string, or the
    dependencies in pyproject.toml."""
    try:
        import_string(s.component.target, "target")
    except InputError as error:
        raise Failed(error.problem) from None


@check("component", after=("imports",))
def kind(s: Subject) -> None:
    """The core calls a component by its kind's methods. Do: derive from the class of kdcore.kinds, or for a loss write
    a plain function of tensors."""
    target = import_string(s.component.target, "target")
    if s.kind in _METHODS:
        method = _METHODS[s.kind]
        if not (
            inspect.isclass(target)
            and any(callable(getattr(target, n, None)) for n in (method, f"{method}_request"))
        ):
            raise Failed(f"a {s.kind} is a class with {method}()")
        return
    base = getattr(kinds, s.kind.capitalize())
    if inspect.isclass(target) and not issubclass(target, base):
        raise Failed(f"{target.__name__} does not derive from kdcore.kinds.{base.__name__}")
    if not inspect.isclass(target) and (s.kind != "loss" or not callable(target)):
        raise Failed(f"a {s.kind} is a class, not a {type(target).__name__}")
    reads = getattr(target, "reads", ())
    if inspect.isclass(target) and (
        bad := [r for r in reads if not re.fullmatch(r"(student|teacher)\.\w[\w.]*", r)]
    ):
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
                replace(s.schema, params={name: parameter}).validate(
                    {name: parameter.default}, s.component.name
                )
            except InputError as error:
                raise Failed(f"{name} = {parameter.default!r}: {error.problem}") from None


@check("component", after=("imports", "kind", "schema"))
def help_text(s: Subject) -> None:
    """`kd list` and `kd show` are the manual. Do: give the Component a summary, and the class or function a docstring."""
    if not s.component.summary.strip():
        raise Failed("its Component has no summary")
    if not (s.target.__doc__ or "").strip():
        raise Failed(f"{s.component.target} has no docstring")
