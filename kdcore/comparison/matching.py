"""Are two arms matched? In their recipes, outside the method, and in what their runs began with."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from kdcore.comparison.arms import Tree, without_method
from kdcore.recipe import parse
from kdcore.source import leaves

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
APART = {"name", "description", "seed", "report", "export", "probe"}  # what decides no bit of the student
MEASURED = {
    "student": "the student's initial weights",
    "ids": "which samples came first",
    "batch": "the first augmented batch",
    "teachers": "the teachers' weights",
    "steps": "the number of steps",
}


def recipe_differences(ours: Tree, theirs: Tree, leave: Container[str] = ()) -> list[str]:
    """Where two recipes differ outside the method and the keys in ``leave``, as ``key: theirs -> ours``."""
    old, new = (_settings(tree) for tree in (theirs, ours))
    rows = ((key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new]) if key not in leave)
    return [f"{key}: {was!r} -> {now!r}" for key, was, now in rows if was != now]


def _settings(tree: Tree) -> dict[str, Any]:
    """Every value of the recipe outside its method by its place, defaults spelt out; nothing is like no value."""
    recipe = parse(without_method(tree, weight=False)).model_dump(exclude=APART)
    return {key: value for key, value in leaves(recipe) if value not in (None, [], {})}


def changes_data(tree: Tree) -> bool:
    """Whether what the student sees is part of the method."""
    tables = (tree, *tree.get("stage", ()))
    return any(each.get("method") for table in tables for each in table.get("augmentation", ()))


def measured_differences(prints: Iterable[Pair], *, data: bool = True) -> list[str]:
    """Where the fingerprints of two arms (``kdcore.guards``), a pair a seed, differ, in words.

    ``data = False`` leaves out which samples came first and what they looked like: the method decides it.
    """
    pairs, keys = list(prints), [key for key in MEASURED if data or key not in ("ids", "batch")]
    return [MEASURED[key] for key in keys if any(mine.get(key) != other.get(key) for mine, other in pairs)]
