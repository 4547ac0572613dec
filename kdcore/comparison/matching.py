"""Are two arms matched? In their recipes, outside the method, and in what their runs began with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdcore.tables import Recipe

METHOD = ("loss", "router", "task.weight")  # what makes a method; arms that differ elsewhere are unmatched
APART = {"name", "description", "seed", "report", "export", "probe"}  # what decides no bit of the student
MEASURED = {
    "student": "the student's initial weights",
    "ids": "which samples came first",
    "batch": "the first augmented batch",
    "teachers": "the teachers' weights",
    "steps": "the number of steps",
}


def recipe_differences(ours: Recipe, theirs: Recipe, leave: Iterable[str] = ()) -> list[str]:
    """Where two recipes differ outside the method and the keys in ``leave``, as ``key: theirs -> ours``.

    Augmentations that say ``method = true`` belong to the method; all others must be the same.
    """
    left = (*METHOD, *leave)

    def apart(key: str) -> bool:
        bare = re.sub(r"^stage\.\d+\.", "", key)  # a stage's own tables are laid over the recipe's
        return any(f"{bare}.".startswith(f"{each}.") for each in left)

    old, new = (_without_own_views(each.model_dump(exclude=APART)) for each in (theirs, ours))
    rows = _rows(old, new)
    return [f"{key}: {was!r} -> {now!r}" for key, was, now in rows if not apart(key)]


def changes_data(recipe: Recipe) -> bool:
    """Whether what the student sees is part of the method."""
    stages = [stage.params.get("augmentation", []) for stage in recipe.stage]
    return any(each.method for each in recipe.augmentation) or any(
        table.get("method") for each in stages for table in each
    )


def measured_differences(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], *, data: bool = True
) -> list[str]:
    """Where the fingerprints of two arms differ, seed by seed (``kdcore.guards``), in words.

    ``data = False`` leaves out which samples came first and what they looked like: the method decides it.
    """
    return [
        words
        for key, words in MEASURED.items()
        if (data or key not in ("ids", "batch"))
        and any(mine.get(key) != other.get(key) for mine, other in zip(ours, theirs, strict=True))
    ]


def _without_own_views(tree: dict[str, Any]) -> dict[str, Any]:
    for table in (tree, *tree.get("stage", ())):
        if table.get("augmentation"):
            table["augmentation"] = [each for each in table["augmentation"] if not each.get("method")]
    return tree


def _rows(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every leaf that differs; lists of equal length are compared item by item."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if old is None and isinstance(new, Mapping) and new:  # a stage may have a table that another's lacks
        old = {}
    if new is None and isinstance(old, Mapping) and old:
        new = {}
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [(place, old, new)]
    keys = dict.fromkeys([*old, *new])
    return [row for k in keys for row in _rows(old.get(k), new.get(k), f"{place}.{k}".strip("."))]
