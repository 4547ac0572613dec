"""The catalogue, registry.toml: what packaging cannot know about each paper and its plugin.

The wheel carries a copy beside this module; in a clone the file at the root is the one that is read.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@cache
def methods() -> dict[str, dict[str, Any]]:
    """Every catalogued method by slug, as registry.toml has it; empty where there is no catalogue."""
    for path in (_HERE / "registry.toml", _HERE.parent / "registry.toml"):
        if path.is_file():
            return {
                entry["slug"]: entry for entry in tomllib.loads(path.read_text("utf-8")).get("method", [])
            }
    return {}


def slugs() -> list[str]:
    return sorted(methods())


def method(slug: str) -> dict[str, Any] | None:
    return methods().get(slug)


def how_to_get(entry: dict[str, Any]) -> str:
    """The command that installs a catalogued plugin today, or that there is none yet."""
    slug = entry["slug"]
    if entry.get("status") == "planned":
        return (
            f"kd-plugin-{slug} is catalogued as planned: it is not written yet (kd list --all shows the road)"
        )
    return f"pip install ./plugins/{slug} from a clone (kd-plugin-{slug} is not published yet)"


def search(text: str) -> list[dict[str, Any]]:
    """Methods that contain every word of ``text`` in their slug, title, summary, claim, kinds or paper."""
    words = text.lower().split()
    return [entry for entry in methods().values() if all(word in str(entry).lower() for word in words)]
