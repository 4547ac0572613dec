"""Mutated recipes meet no other end than a valid recipe or an InputError of less than 30 lines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdcore
from kdcore.errors import InputError
from kdcore.source import override

BASE: dict[str, Any] = {
    "name": "tiny",
    "seed": 1,
    "data": {"source": "kdcore.datasets:digits", "args": {"labels": 100, "flat": True}, "batch_size": 32},
    "teacher": {
        "main": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [16]}, "train": {"epochs": 1}}
    },
    "student": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [8]}},
    "loss": [{"use": "kd", "temperature": 4.0, "weight": {"start": 0.1, "end": 1.0}}, {"use": "task"}],
    "task": {"metrics": ["accuracy"]},
    "train": {"epochs": 2, "optimizer": {"use": "AdamW", "lr": 2e-3}, "schedule": {"use": "cosine"}},
    "stage": [{"use": "distill", "name": "first", "train": {"epochs": 1}}],
    "report": {"baseline": True},
}
NUMBERS = [
    None,
    True,
    0,
    -1,
    1,
    2**63,
    -(2**70),
    10**400,
    0.0,
    -0.0,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
]
TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "\u202eabc",
    "x" * 5000,
    "@main",
    "@first.student",
    "../..",
    "a:b",
    "os:system",
]
NAMES = ["kdcore.zoo:mlp", "kdcore.zoo:conv_net", "self", "kd", "task", "module", "distill", "AdamW", "LBFGS"]
TREES = [[], {}, [[]], [{}], {"use": "kd"}, {"use": 5}, {"": ""}, [1, "x"], {"a": {"b": {"c": []}}}]
ODD = st.sampled_from([*NUMBERS, *TEXTS, *NAMES, *TREES])
KEYS = [
    "use",
    "name",
    "weight",
    "teacher",
    "reads",
    "stream",
    "optimizer",
    "view",
    "train",
    "tune",
    "clip",
    "steps",
]


def spots(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything below ``node``."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [p for key, value in items for p in [(*path, key), *spots(value, (*path, key))]]


def mutate(tree: dict[str, Any], draw: Any) -> None:
    found = spots(tree)
    path = draw(st.sampled_from(found))
    parent: Any = tree
    for key in path[:-1]:
        parent = parent[key]
    key, kind = (
        path[-1],
        draw(st.sampled_from(["set", "drop", "rename", "nest", "wrap", "add", "swap", "text"])),
    )
    if kind == "set":
        parent[key] = copy.deepcopy(draw(ODD))
    elif kind == "drop":
        del parent[key]
    elif kind == "nest":
        parent[key] = {"use": "kd", "inner": parent[key]}
    elif kind == "wrap":
        parent[key] = [parent[key]] * draw(st.integers(0, 3))
    elif kind == "text":
        parent[key] = draw(st.text(max_size=20))
    elif kind == "swap":
        other: Any = tree
        for step in draw(st.sampled_from(found)):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    elif isinstance(parent, dict):
        new = draw(st.sampled_from(KEYS) | st.text(max_size=10))
        parent[new] = parent.pop(key) if kind == "rename" else copy.deepcopy(draw(ODD))


@contextmanager
def valid_or_refused() -> Iterator[None]:
    """No other end than none at all, or an InputError that fits on a screen."""
    try:
        yield
    except InputError as error:
        text = str(error)
        text.encode("utf-8")  # lone surrogates would raise here
        if not text.strip() or len(text.splitlines()) >= 30:
            pytest.fail(text)


@settings(
    max_examples=250, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_mutated_recipes_are_valid_or_refused_in_words(data: st.DataObject) -> None:
    tree = copy.deepcopy(BASE)
    for _ in range(data.draw(st.integers(1, 3))):
        if spots(tree):
            mutate(tree, data.draw)
    with valid_or_refused():
        kdcore.check(tree)


@settings(max_examples=120, derandomize=True, deadline=None, database=None)
@given(
    st.lists(
        st.sampled_from([*KEYS, "loss", "train", "student", "data", "0", "7", "-1", "²"])
        | st.text(max_size=4)
    ),
    st.text(max_size=30) | st.sampled_from(["[" * 200, "{a=1}", "1e999", "'", "2020-01-01", "0x10", "@x.y"]),
)
def test_overrides_are_applied_or_refused_in_words(path: list[str], value: str) -> None:
    tree = copy.deepcopy(BASE)
    with valid_or_refused():
        override(tree, f"{'.'.join(path)}={value}")
