"""The catalogue, registry.toml: what packaging cannot know about each paper and its plugin.

It lies beside this module, so that sdist and wheel carry it; at the root of a clone is a link to it.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "registry.toml"


@cache
def methods() -> dict[str, dict[str, Any]]:
    """Every catalogued method by slug, as registry.toml has it; empty where there is no catalogue."""
    text = FILE.read_text("utf-8") if FILE.is_file() else ""
    return {entry["slug"]: entry for entry in tomllib.loads(text).get("method", [])}


def method(slug: str) -> dict[str, Any] | None:
    return methods().get(slug)


def how_to_get(entry: dict[str, Any]) -> str:
    """The command that installs a catalogued plugin today, or that there is none yet."""
    slug = entry["slug"]
    if entry.get("status") == "planned":
        return f"kd-plugin-{slug} is planned: it is not written yet (kd list --all shows the road)"
    return f"pip install ./plugins/{slug} from a clone (kd-plugin-{slug} is not published yet)"


def search(text: str) -> list[dict[str, Any]]:
    """Methods that contain every word of ``text`` in their slug, title, summary, claim, kinds or paper."""
    words = text.lower().split()
    return [entry for entry in methods().values() if all(word in str(entry).lower() for word in words)]
