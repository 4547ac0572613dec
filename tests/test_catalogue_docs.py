"""Generated documentation is fresh, and the catalogue agrees with what is in the repository."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = {e["slug"]: e for e in tomllib.loads((ROOT / "registry.toml").read_text("utf-8"))["method"]}
FOLDERS = {path.parent.name: path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml")}


def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_map_of_the_core_has_every_module_once() -> None:
    text = (ROOT / "docs" / "core.md").read_text("utf-8")
    core = ROOT / "kdcore"
    apart = {path.parent for path in core.glob("*/__init__.py")} - {core / "cli"}  # one line a package
    modules = [*core.glob("*.py"), *core.glob("cli/*.py"), *apart]
    for path in modules:
        where = path.relative_to(core).as_posix().removesuffix("/__init__.py")
        if where not in ("__init__.py", "__main__.py"):
            assert text.count(f"(../kdcore/{where})") == 1, where


@pytest.mark.parametrize("slug", sorted({*ENTRIES, *FOLDERS}))
def test_status_and_folders_agree(slug: str) -> None:
    assert slug in ENTRIES, f"plugins/{slug} is not in registry.toml"
    assert (slug in FOLDERS) == (ENTRIES[slug]["status"] != "planned")


@pytest.mark.parametrize("slug", sorted(FOLDERS))
def test_one_slug_gives_every_name(slug: str) -> None:
    """Folder, distribution, module, entry point, test; the same small pyproject, and no tool table in it."""
    folder, module = FOLDERS[slug], f"kd_plugin_{slug.replace('-', '_')}"
    tree = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    project = tree["project"]
    assert project["name"] == f"kd-plugin-{slug}"
    assert project["dynamic"] == ["version", "description"]
    assert project["entry-points"]["kdcore"] == {slug: module}
    assert set(tree) == {"build-system", "project"}
    assert tree["build-system"]["build-backend"] == "flit_core.buildapi"
    assert any(text.startswith("kdcore") for text in project["dependencies"])
    assert (folder / module / "__init__.py").is_file()
    assert (folder / "README.md").is_file()
    assert list(folder.glob("test_*.py")) or list(folder.glob("tests/test_*.py"))
    assert list((folder / module).glob("*.toml")), "no recipe ships with the plugin"


def test_the_wheel_carries_the_catalogue() -> None:
    assert (ROOT / "kdcore" / "registry.toml").read_text("utf-8") == (ROOT / "registry.toml").read_text(
        "utf-8"
    )
