"""The documentation names every hook, every event with its arguments, and everything of ``self.run``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from kdcore.context import RunContext
from kdcore.hookspecs import EVENTS, HOOKS, RunEvents
from kdcore.tables import Recipe
from kdcore.types import CONVENTIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PLUGINS = (DOCS / "plugins.md").read_text("utf-8")
RECIPES = (DOCS / "recipes.md").read_text("utf-8")


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_every_hook_is_documented(hook: str) -> None:
    assert f"`{hook}()`" in PLUGINS


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_every_event_is_documented_with_its_arguments(event: str) -> None:
    names = list(inspect.signature(getattr(RunEvents, event)).parameters)[1:]
    assert f"`{event}({', '.join(names)})`" in PLUGINS


@pytest.mark.parametrize(
    "name",
    sorted(n for n in vars(RunContext) if not n.startswith("_") and "state_dict" not in n and n != "reseed"),
)
def test_everything_of_run_is_documented(name: str) -> None:
    assert re.search(rf"`[^`]*\b{name}\b", PLUGINS), f"self.run.{name} is missing from docs/plugins.md"


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_is_documented(convention: str) -> None:
    assert convention in PLUGINS


def test_every_key_of_a_recipe_is_documented() -> None:
    missing = []
    for table, field in Recipe.model_fields.items():
        models = [m for m in _models(field.annotation) if hasattr(m, "model_fields")]
        missing += [f"{table}.{key}" for m in models for key in m.model_fields if f"`{key}`" not in RECIPES]
        if f"`{table}`" not in RECIPES and f"[{table}]" not in RECIPES and f"[[{table}]]" not in RECIPES:
            missing += [] if table == "teacher" else [table]
    assert not missing


def _models(annotation: object) -> list[object]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(m for each in inner for m in _models(each))]


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert not [link for link in links if not (DOCS / link).exists()]
