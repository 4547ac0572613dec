"""Arms: the recipes that a comparison runs, each made from the one recipe. No torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kdcore import catalog, plugins
from kdcore.errors import InputError
from kdcore.recipe import Source, parse
from kdcore.source import override
from kdcore.tables import Recipe

Tree = dict[str, Any]
STOCK = ("none", "kd")
_SPEC = re.compile(r"(?P<name>.+?)(?::(?P<overrides>[^:=]+=.*))?", re.DOTALL)
_COMMA = re.compile(r",\s*(?=\w[\w.-]*=)")  # an inline table's own commas have a space before their "="


def arms_of(source: Source, specs: Iterable[str]) -> tuple[dict[str, Tree], str]:
    """Arm name -> recipe tree, and which of them is the recipe itself.

    ``none`` is the student alone (no losses, the task's weight 1) and ``kd`` the stock loss at its defaults
    in place of the recipe's losses, router and augmentations of ``method = true``. ``NAME`` puts the loss
    component NAME in place of loss.0; ``NAME:KEY=VALUE,...`` overrides keys. Raises InputError for a name
    that is no component, or used twice.
    """
    base = _prepared(source.tree)
    own = re.sub(r"[^\w.+-]+", "-", str(base.get("name", ""))).strip("-")
    own = own if own and own not in STOCK else "recipe"
    found: dict[str, Tree] = {}
    if parse(base).task.use != "none":  # a task's weight beside a distillation term says nothing of it alone
        found["none"] = without_method(base, weight=False)
    if base.get("teacher"):
        found["kd"] = {**without_method(base), "loss": [{"use": "kd"}]}
    found[own] = base
    given: set[str] = set()
    for spec in specs:
        name, label, overrides = _read(spec)
        if label in given or (overrides and label in ("recipe", own)):
            raise InputError("--arm", "two arms have this name", given=label, hint="give one another name")
        given.add(label)
        if not overrides and name == _first(base).get("use") and label not in STOCK:
            found = {label if key == own else key: tree for key, tree in found.items()}
            own = label  # the recipe itself, under its method's name
        elif overrides or (name not in ("recipe", own) and name not in found):
            stock = found.get(name) if name in STOCK else None
            found[label] = _overridden(stock or _based(base, name, overrides), overrides)
    return found, own


def without_method(tree: Mapping[str, Any], *, weight: bool = True) -> Tree:
    """The recipe without losses, router and augmentations of ``method = true``, its own and its stages'.

    ``weight = False``: without the task's weight, too.
    """
    out = copy.deepcopy(dict(tree))
    for table in (out, *out.get("stage", ())):
        for key in ("loss", "router"):
            table.pop(key, None)
        if "task" in table and not weight:
            table["task"].pop("weight", None)
        if "augmentation" in table:
            table["augmentation"] = [each for each in table["augmentation"] if not each.get("method")]
    return out


def _read(spec: str) -> tuple[str, str, list[str]]:
    """(what the arm starts from, its name, its overrides)."""
    match, allowed = _SPEC.fullmatch(spec), "NAME, NAME:KEY=VALUE,..."
    name, overrides = match.groups() if match else ("", None)
    label = name.rpartition(":")[2]
    if not re.fullmatch(r"\w[\w.+-]*", label):
        raise InputError("--arm", "no arm can have this name", given=spec, allowed=allowed)
    if ":" in name and "." in label and label.partition(".")[0] in Recipe.model_fields:
        raise InputError("--arm", "an override without a value", given=spec, allowed=allowed)
    return name, label, _COMMA.split(overrides) if overrides else []


def _prepared(tree: Mapping[str, Any]) -> Tree:
    """The recipe without baseline and export, on a fixed number of threads."""
    base = {key: copy.deepcopy(value) for key, value in tree.items() if key != "export"}
    threads = {"threads": 1, **base.get("train", {})}
    return {**base, "report": {"baseline": False, "guards": True}, "train": threads}


def _based(base: Tree, name: str, overrides: list[str]) -> Tree:
    """What overrides start from: the recipe, or the recipe with the component ``name`` in place of loss.0.

    The recipe where an override chooses the component, or where the name is a mere label.
    """
    chosen = name == _first(base).get("use") or any(each.startswith("loss.0.use=") for each in overrides)
    known = name in plugins.registry().offers["loss"] or ":" in name or catalog.method(name) is not None
    if chosen or (overrides and not known):
        return base
    plugins.registry().find("loss", name, f"--arm {name}")
    return {**base, "loss": [_replacing(_first(base), name), *base.get("loss", [])[1:]]}


def _overridden(tree: Tree, overrides: list[str]) -> Tree:
    tree = copy.deepcopy(tree)
    for each in sorted(overrides, key=lambda o: not o.partition("=")[0].endswith(".use")):  # use first
        step = re.fullmatch(r"loss\.(\d+)\.use=(.*)", each)
        if step and int(step[1]) < len(tree.get("loss", [])):
            tree["loss"][int(step[1])] = _replacing(tree["loss"][int(step[1])], step[2].strip("\"'"))
        else:
            override(tree, each)
    return tree


def _replacing(old: Mapping[str, Any], use: str) -> Tree:
    """Another component gets the old one's teacher and stream, nothing that another method was set to."""
    kept = old if old.get("use") == use else {key: old[key] for key in ("teacher", "stream") if key in old}
    return {**kept, "use": use}


def _first(tree: Tree) -> Mapping[str, Any]:
    losses = tree.get("loss")
    return losses[0] if losses else {}
