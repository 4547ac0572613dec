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
    """Where two recipes differ outside the method and the keys in ``leave``, as ``key: theirs -> ours``."""
    left = (*METHOD, *leave)

    def apart(key: str) -> bool:
        bare = re.sub(r"^stage\.\d+\.", "", key)  # a stage's own tables are laid over the recipe's
        return any(f"{bare}.".startswith(f"{each}.") for each in left)

    rows = _rows(theirs.model_dump(exclude=APART), ours.model_dump(exclude=APART))
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in rows if not apart(key)]


def measured_differences(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the fingerprints of two arms differ, seed by seed (``kdcore.guards``), in words."""
    return [
        words
        for key, words in MEASURED.items()
        if any(mine.get(key) != other.get(key) for mine, other in zip(ours, theirs, strict=True))
    ]


def _rows(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every leaf that differs; lists of equal length are compared item by item."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [(place, old, new)]
    keys = dict.fromkeys([*old, *new])
    return [row for k in keys for row in _rows(old.get(k), new.get(k), f"{place}.{k}".strip("."))]
