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
    if parse(base).task.use != "none":
        found["none"] = none = _without_method(base)
        for table in (none, *none.get("stage", ())):
            if "task" in table:  # a weight beside a distillation term says nothing of the task alone
                table["task"] = {k: v for k, v in table["task"].items() if k != "weight"}
    if base.get("teacher"):
        found["kd"] = {**_without_method(base), "loss": [{"use": "kd"}]}
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


def _read(spec: str) -> tuple[str, str, list[str]]:
    match = _SPEC.fullmatch(spec)
    name = match["name"] if match else ""
    label = name.rpartition(":")[2]
    if not re.fullmatch(r"\w[\w.+-]*", label):
        raise InputError("--arm", "no arm can have this name", given=spec, allowed="NAME, NAME:KEY=VALUE,...")
    if ":" in name and "." in label and label.partition(".")[0] in Recipe.model_fields:
        raise InputError("--arm", "an override without a value", given=spec, allowed="NAME:KEY=VALUE,...")
    return name, label, _COMMA.split(match["overrides"]) if match and match["overrides"] else []


def _prepared(tree: Mapping[str, Any]) -> Tree:
    """The recipe without baseline, export and probes, on a fixed number of threads."""
    base = {k: v for k, v in copy.deepcopy(dict(tree)).items() if k not in ("export", "probe")}
    base["report"] = {"baseline": False, "guards": True}
    base["train"] = {"threads": 1, **base.get("train", {})}
    return base


def _without_method(base: Tree) -> Tree:
    def stripped(table: Mapping[str, Any]) -> Tree:
        kept = {k: copy.deepcopy(v) for k, v in table.items() if k not in ("loss", "router")}
        if "augmentation" in kept:
            kept["augmentation"] = [each for each in kept["augmentation"] if not each.get("method")]
        return kept

    tree = stripped(base)
    return {**tree, "stage": [stripped(stage) for stage in tree["stage"]]} if "stage" in tree else tree


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
    return (
        dict(old)
        if old.get("use") == use
        else {"use": use, **{k: old[k] for k in ("teacher", "stream") if k in old}}
    )


def _first(tree: Tree) -> Mapping[str, Any]:
    losses = tree.get("loss")
    return losses[0] if losses else {}
