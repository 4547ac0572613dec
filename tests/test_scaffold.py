"""``kd plugin new`` writes a plugin of the standard form that passes its own tests at once."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from flit_core import buildapi

import kdcore
from kdcore import plugins, scaffold
from kdcore.errors import InputError
from kdcore.plugins import Entry


@pytest.mark.parametrize(
    ("slug", "kind", "target"),
    [("rv-router", "router", "RvRouter"), ("soft-loss", "loss", "soft_loss"), ("loss", "loss", "loss_loss")],
)
def test_a_slug_that_ends_with_its_kind_does_not_double_it(
    slug: str, kind: str, target: str, tmp_path: Path
) -> None:
    folder = scaffold.write(slug, kind, tmp_path)
    module = f"kd_plugin_{slug.replace('-', '_')}"
    assert f'"{module}.{kind}:{target}"' in (folder / module / "__init__.py").read_text("utf-8")
    assert f" {target}(" in (folder / module / f"{kind}.py").read_text("utf-8")


@pytest.mark.parametrize("kind", sorted(scaffold.TARGETS))
def test_a_new_plugin_passes_its_own_tests(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slug = f"made-{kind}"
    folder = scaffold.write(slug, kind, tmp_path)
    module = f"kd_plugin_made_{kind}"
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["kdcore"] == {slug: module}
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    entry = Entry(slug, f"kd-plugin-{slug}", "0.1", module)
    real = plugins._entry_points()
    monkeypatch.setattr(plugins, "_entry_points", lambda: [*real, entry])
    plugins.registry.cache_clear()
    try:
        assert not plugins.registry().quarantine
        assert pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]) == 0
        run = kdcore.run(f"{slug}:digits", overrides=["train.epochs=1", *_short(kind)], out=tmp_path / "run")
        assert run.metrics["accuracy"] > 0
    finally:
        plugins.registry.cache_clear()


def _short(kind: str) -> list[str]:
    return [] if kind == "teacher" else ["teacher.main.train.epochs=1"]


def test_it_is_clean_by_the_repositorys_own_rules(tmp_path: Path) -> None:
    for kind in scaffold.TARGETS:
        scaffold.write(f"made-{kind}", kind, tmp_path)
    config = Path(__file__).resolve().parent.parent / "pyproject.toml"
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", str(config), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_its_templates_are_in_the_wheel_and_in_the_sdist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scaffold.TEMPLATES.parent.parent)
    wheel, sdist = buildapi.build_wheel(str(tmp_path)), buildapi.build_sdist(str(tmp_path))
    inside = zipfile.ZipFile(tmp_path / wheel).namelist()
    with tarfile.open(tmp_path / sdist) as archive:
        source = [name.partition("/")[2] for name in archive.getnames()]
    for path in scaffold.TEMPLATES.rglob("*.tmpl"):
        name = f"kdcore/templates/{path.relative_to(scaffold.TEMPLATES)}"
        assert name in inside
        assert name in source


@pytest.mark.parametrize(
    ("slug", "kind", "message"),
    [
        ("Bad_Slug", "loss", "not a slug"),
        ("fine", "lose", "did you mean 'loss'"),
        ("pld", "loss", "a plugin or a component of this name is installed"),
        ("kd", "loss", "a plugin or a component of this name is installed"),
    ],
)
def test_wrong_requests(slug: str, kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        scaffold.write(slug, kind, tmp_path)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="exists already"):
        scaffold.write("mine", "loss", tmp_path)
