"""What a plugin as a whole, and each component's declaration, must be like."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcore import api, catalog, kinds, recipe
from kdcore.hookspecs import GROUP
from kdcore.testing.findings import check, fail_if, skip_if
from kdcore.testing.opening import Plugin
from kdcore.testing.oracle import check_oracle, oracles_of
from kdcore.testing.subjects import Subject
from kdcore.types import KINDS

# ---- checks of the whole ------------------------------------------------------------------------------


@check("plugin", after=())
def naming(p: Plugin) -> None:
    """One slug gives every name, so that an error, a recipe and pip speak of the same thing. Do: folder SLUG,
    distribution kd-plugin-SLUG (or kd-exporter-SLUG), module kd_plugin_SLUG with underscores, entry point SLUG."""
    slug, distribution = p.entry.name, p.entry.distribution
    skip_if(distribution == GROUP, "the core itself")
    name = f"kd-{'exporter' if distribution.startswith('kd-exporter') else 'plugin'}-{slug}"
    wanted = {"distribution": name, "module": name.replace("-", "_"), "folder": slug}
    found = {"distribution": distribution, "module": p.entry.target.partition(".")[0]}
    if p.folder is not None and p.folder.parent.name in ("plugins", "exporters"):
        found["folder"] = p.folder.name
    wrong = [f"{key} {value!r}, not {wanted[key]!r}" for key, value in found.items() if value != wanted[key]]
    fail_if(wrong, f"slug {slug!r}: {'; '.join(wrong)}")


@check("plugin", after=())
def light_import(p: Plugin) -> None:
    """Every `kd list` imports every plugin's entry-point module. Do: import torch and the like in the component's own
    module, which the target names."""
    if p.fault is not None:
        broken = p.fault.error.startswith("imports ")
        fail_if(broken, f"{p.entry.target} cannot be imported without torch and the like: {p.fault.error}")


@check("plugin", after=("light_import",))
def loads(p: Plugin) -> None:
    """A plugin in quarantine offers nothing. Do: mend what the phase's error names."""
    if p.fault is not None:
        fail_if(True, f"in quarantine ({p.fault.phase}): {p.fault.error}")
    fail_if(not p.components, "its hooks answer with no component")


@check("plugin", after=("light_import", "loads"))
def oracle(p: Plugin) -> None:
    """A method whose numbers nobody has checked against its paper may be another method. Do: list oracles as ORACLES in
    the package's oracle module (docs/testing.md), or set status = "experimental" in registry.toml."""
    found, entry = oracles_of(p.entry.target), catalog.method(p.entry.name) or {}
    for each in found:
        check_oracle(each)
    computes = entry.get("kind_of") == "method" or any(kind in ("loss", "router") for kind, _ in p.components)
    held = not found and computes and entry.get("status") in ("implemented", "demonstrated")
    fail_if(held, f"the catalogue has it as {entry.get('status')}, and it has no oracle")
    why = "has no oracle: experimental" if computes else "has no oracle, and no loss or router"
    skip_if(not found, why)


@check("plugin", after=("light_import", "loads"))
def recipe_runs(p: Plugin) -> None:
    """The first thing that a user tries is the plugin's recipe. Do: read the error; `kd run SLUG train.steps=2` shows
    it whole."""
    skip_if(not p.recipes, "has no recipe")
    tree = _shortened({"train": {}, **recipe.read(p.recipes[0]).tree})
    with tempfile.TemporaryDirectory() as folder:
        api.run(tree, out=Path(folder) / "run", quiet=True)


def _shortened(tree: Any) -> Any:
    """A recipe of two steps everywhere, on the CPU, that exports nothing."""
    if isinstance(tree, list):
        return [_shortened(each) for each in tree]
    if not isinstance(tree, Mapping):
        return tree
    kept = {key: _shortened(value) for key, value in tree.items() if key not in ("export", "report")}
    if isinstance(train := kept.get("train"), Mapping):  # a student's is a list of patterns
        lasting = {key: value for key, value in train.items() if key not in ("epochs", "checkpoint_every")}
        kept["train"] = {**lasting, "steps": 2, "device": "cpu"}
    return kept


# ---- checks of one component's declaration ------------------------------------------------------------


@check(*KINDS, after=())
def imports(s: Subject) -> None:
    """A target that cannot be imported fails when a recipe first names it. Do: correct the import string, or the
    dependencies in pyproject.toml."""
    _ = s.target


@check(*KINDS, after=("imports",))
def kind(s: Subject) -> None:
    """The core calls a component by its kind's methods. Do: derive from the class of kdcore.kinds, or for a loss write
    a plain function of tensors."""
    target, base = s.target, getattr(kinds, s.kind.capitalize())
    if s.kind == "loss" and inspect.isfunction(target):
        return
    fail_if(not inspect.isclass(target), f"a {s.kind} is a class, not a {type(target).__name__}")
    # an exporter is made to be used where there is no kdcore, too
    fits = hasattr(target, "export_request") if s.kind == "exporter" else issubclass(target, base)
    fail_if(not fits, f"{target.__name__} does not derive from kdcore.kinds.{base.__name__}")
    bad = [
        name
        for name in getattr(target, "reads", ())
        if not re.fullmatch(r"(student|teacher)\.\w[\w.]*", name)
    ]
    fail_if(bad, f"reads {', '.join(bad)}: neither student.NAME nor teacher.NAME")


@check(*KINDS, after=("imports",))
def schema(s: Subject) -> None:
    """Parameters are checked by their annotations before a run. Do: annotate every parameter; of a loss function the
    positional arguments are tensors, the keyword-only ones parameters."""
    _ = s.schema.model
    untyped = [name for name, p in s.schema.params.items() if p.annotation is p.empty]
    fail_if(untyped, f"parameters without a type: {', '.join(untyped)}")
    deaf = s.kind == "loss" and not inspect.isclass(s.target) and not s.schema.tensors
    fail_if(deaf, "a loss function without positional arguments gets no tensors")


@check(*KINDS, after=("imports", "schema"))
def defaults(s: Subject) -> None:
    """A default that its own annotation refuses cannot be written in a recipe. Do: correct the default or the range."""
    params = {name: p for name, p in s.schema.params.items() if p.default is not p.empty}
    replace(s.schema, params=params).validate({n: p.default for n, p in params.items()}, s.component.name)


@check(*KINDS, after=("imports", "kind", "schema"))
def help_text(s: Subject) -> None:
    """`kd list` and `kd show` are the manual. Do: give the Component a summary, and the class or function a docstring."""
    fail_if(not s.component.summary.strip(), "its Component has no summary")
    fail_if(not (s.target.__doc__ or "").strip(), f"{s.component.target} has no docstring")
