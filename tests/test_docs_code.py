"""The code of docs/plugins.md, docs/testing.md and docs/recipes.md runs as it stands: as a plugin, its oracles and its
tests; as a recipe on data and models of one's own, by the command lines that stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcore import cli
from kdcore.hookspecs import HOOKS
from kdcore.testing import check_plugin
from kdcore.testing.opening import opened

DOCS = Path(__file__).resolve().parent.parent / "docs"
HOOK_OF = {kind: hook for hook, kind in HOOKS.items()}


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


PLUGIN, TESTS = blocks("plugins.md"), blocks("testing.md")
CLASSES = [block for block in PLUGIN if re.search(r"^class ", block, re.MULTILINE)]


def write(folder: Path, slug: str, files: dict[str, str]) -> Path:
    module = f"kd_plugin_{slug.replace('-', '_')}"
    project = f'[project]\nname = "kd-plugin-{slug}"\nentry-points.kdcore.{slug} = "{module}"\n'
    (folder / module).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(project)
    for name, text in files.items():
        (folder / module / name).write_text(text)
    return folder


@pytest.fixture
def my_method(tmp_path: Path) -> Iterator[Path]:
    """The plugin that the two pages write, as if installed."""
    named = {re.match(r"# kd_plugin_my_method/(\w+\.py)", block): block for block in [*PLUGIN, *TESTS]}
    files = {found[1]: block for found, block in named.items() if found}
    assert files.keys() == {"__init__.py", "loss.py", "oracle.py"}
    with opened(write(tmp_path, "my-method", files)):
        yield tmp_path


def test_the_plugin_of_the_guide_conforms_and_its_oracles_hold(my_method: Path) -> None:
    findings = check_plugin(my_method)
    assert [str(finding) for finding in findings if finding.failed] == []
    verdicts = {finding.check: finding.verdict for finding in findings}
    assert {verdicts[name] for name in ("light_import", "oracle", "t_squared", "zero_at_teacher")} == {
        "passed"
    }


def test_the_tests_of_the_guide_pass(my_method: Path) -> None:
    scopes: list[dict[str, Any]] = [{} for _ in TESTS]
    for block, scope in zip(TESTS, scopes, strict=True):
        exec(block, scope)
    assert scopes[0]["failed"] == []
    (mark,) = scopes[0]["test_conformance"].pytestmark
    assert {"my-method-naming", "loss my-method-mask"} <= {case.id for case in mark.args[1]}
    for oracle in scopes[2]["ORACLES"]:
        scopes[2]["test_oracle"](oracle)


@pytest.mark.parametrize("block", CLASSES, ids=lambda block: re.findall(r"^class (\w+)", block, re.M)[0])
def test_every_class_of_the_guide_conforms(block: str, tmp_path: Path) -> None:
    ((name, base),) = re.findall(r"^class (\w+)\((\w+)\):", block, re.MULTILINE)
    init = f"""from kdcore import Component, hookimpl
@hookimpl
def {HOOK_OF[base.lower()]}():
    yield Component("theirs", "kd_plugin_theirs.part:{name}", "an example of the guide")
"""
    findings = check_plugin(write(tmp_path, "theirs", {"__init__.py": init, "part.py": block}))
    assert [str(finding) for finding in findings if finding.failed] == []
    assert any(finding.check == "kind" and finding.verdict == "passed" for finding in findings)


def test_no_block_is_left_out() -> None:
    modules = [block for block in [*PLUGIN, *TESTS] if block.startswith("# kd_plugin_my_method/")]
    assert len(CLASSES) == 5
    assert len(PLUGIN) + len(TESTS) == len(CLASSES) + len(modules) + 2


def test_the_recipe_on_data_and_models_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run, compared, exported and served by the page's own lines, in its folder."""
    monkeypatch.chdir(tmp_path)
    section = (DOCS / "recipes.md").read_text("utf-8").partition("## Your own data and model\n")[2]
    module, recipe, commands, serving = re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)[:4]
    for text in (module, recipe):
        Path(text.partition("\n")[0].removeprefix("# ")).write_text(text, "utf-8")
    for line in commands.splitlines():
        with pytest.raises(SystemExit, match="0"):
            cli.main(line.split()[1:])
    artefact = json.loads(Path("runs/tumours/artefact/artefact.json").read_text("utf-8"))
    assert artefact["axes"]["batch"] == {"min": 1, "max": 256, "multiple_of": 1}
    assert artefact["labels"] == ["malignant", "benign"]
    assert artefact["provenance"]["source"]["data_licence"] == "CC BY 4.0"
    exec(serving, {})
    assert "['malignant', 'malignant', 'malignant']" in capsys.readouterr().out
