"""Who may import whom: the core's layers, plugins on their own, light modules without torch, mmengine in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdcore

CORE = Path(kdcore.__file__).parent
ROOT = CORE.parent
LIGHT = (
    "__init__",
    "errors",
    "types",
    "hookspecs",
    "catalog",
    "plugins",
    "source",
    "tables",
    "validation",
    "signature",
    "recipe",
    "stock",
    "cli/__init__",
    "cli/common",
    "cli/doing",
    "cli/looking",
    "cli/writing",
)
MMENGINE = {"engine.py", "engine_hooks.py", "checkpoint.py"}
PACKAGES = sorted(
    p.parent
    for p in [
        *ROOT.glob("plugins/*/kd_plugin_*/__init__.py"),
        *ROOT.glob("exporters/*/kd_exporter_*/__init__.py"),
    ]
)


def imported(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Modules that a file imports at run time; ``top_level``: without those inside functions."""
    todo: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo += ast.iter_child_nodes(node)


def tops(path: Path, **options: bool) -> set[str]:
    return {name.partition(".")[0] for name in imported(path, **options)}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_no_torch_at_module_level(name: str) -> None:
    heavy = {"torch", "mmengine", "numpy", "transformers", "safetensors", "torchmetrics"}
    assert not tops(CORE / f"{name}.py", top_level=True) & heavy


def test_the_core_imports_no_plugin_and_no_exporter() -> None:
    for path in CORE.rglob("*.py"):
        assert not [n for n in tops(path) if n.startswith(("kd_plugin_", "kd_exporter_"))], path


def test_only_the_engine_and_checkpoints_know_mmengine() -> None:
    found = {path.name for path in CORE.rglob("*.py") if "mmengine" in tops(path)}
    assert found == MMENGINE


ORDER = [
    "errors",
    "types",
    "hookspecs",
    "catalog",
    "plugins",
    "source",
    "tables",
    "validation",
    "signature",
    "recipe",
    "kinds",
    "function_loss",
    "terms",
    "context",
    "distill",
    "building",
    "preparing",
    "stages",
    "rounds",
    "engine",
    "running",
    "api",
    "cli/__init__",
]


@pytest.mark.parametrize("name", ORDER)
def test_each_layer_imports_only_what_stands_before_it(name: str) -> None:
    later = {f"kdcore.{each}" for each in ORDER[ORDER.index(name) + 1 :]}
    assert not set(imported(CORE / f"{name}.py", top_level=True)) & later


def test_only_a_run_that_asks_for_it_imports_what_shards_models() -> None:
    for path in CORE.rglob("*.py"):
        assert "kdcore.sharding" not in set(imported(path, top_level=True)), path


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_a_plugin_imports_no_other_plugin_and_no_private_name(package: Path) -> None:
    for path in package.rglob("*.py"):
        for name in imported(path):
            top = name.partition(".")[0]
            assert not top.startswith(("kd_plugin_", "kd_exporter_")) or top == package.name, (path, name)
            private = [p for p in name.split(".")[1:] if p.startswith("_")]
            assert top != "kdcore" or not private, (path, name)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_a_plugins_entry_module_is_light(package: Path) -> None:
    from kdcore.plugins import HEAVY

    assert not tops(package / "__init__.py", top_level=True) & set(HEAVY)


def test_every_public_name_is_listed_and_there() -> None:
    assert set(kdcore.__all__) <= set(dir(kdcore))
    for name in kdcore.__all__:
        assert getattr(kdcore, name).__module__.startswith(("kdcore", "pluggy")), name
