"""Discovery: broken plugins beside good ones, clashes, allow and block lists."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kdcore
from kdcore import plugins
from kdcore.errors import InputError
from kdcore.plugins import Entry

GOOD = """
    from kdcore import Component, hookimpl
    @hookimpl
    def kd_losses():
        yield Component("{slug}", "kdcore.losses:kd_loss", summary="fine")
"""
HEAD = "from kdcore import Component, hookimpl\n"
BROKEN = {
    "raises": ("import", "raise RuntimeError('on purpose')", "on purpose"),
    "exits": ("import", "import sys\nsys.exit(3)", "SystemExit"),
    "torchy": ("import", "import torch", "imports torch: import it inside"),
    "misspelt": ("hooks", HEAD + "@hookimpl\ndef kd_los():\n    return []", "kd_los"),
    "unmarked": ("hooks", HEAD + "def kd_losses():\n    return []", "not marked"),
    "argument": ("hooks", HEAD + "@hookimpl\ndef kd_losses(config):\n    return []", "config"),
    "rubbish": (
        "declare",
        HEAD + "@hookimpl\ndef kd_losses():\n    return [42]",
        "42, given as a loss, is not",
    ),
    "notiterable": (
        "declare",
        HEAD + "@hookimpl\ndef kd_losses():\n    return 42",
        "kd_losses() gives 42, not",
    ),
    "hookraises": ("declare", HEAD + "@hookimpl\ndef kd_losses():\n    1 / 0", "ZeroDivisionError"),
    "stranger": (
        "declare",
        HEAD + "@hookimpl\ndef kd_losses():\n    yield Component('other', 'a:b')",
        "must be named",
    ),
    "target": (
        "declare",
        HEAD + "@hookimpl\ndef kd_losses():\n    yield Component('target', 'no colon')",
        "module:attribute",
    ),
    "endless": (
        "declare",
        HEAD
        + "import itertools\n@hookimpl\ndef kd_losses():\n"
        + "    return (Component(f'endless.p{i}', 'a:b') for i in itertools.count())",
        "more than 1000",
    ),
    "mute": (
        "import",
        "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\nraise Mute",
        "Mute",
    ),
    "long": ("import", "raise RuntimeError('line\\n' * 10_000)", "line line"),
    "syntax": ("import", "def (", "SyntaxError"),
    "kindly": ("import", "from kdcore import Loss", "import it inside the component's own module"),
    "twice": (
        "declare",
        HEAD + "@hookimpl\ndef kd_losses():\n    yield from [Component('twice', 'a:b')] * 2",
        "declared twice",
    ),
}


@pytest.mark.parametrize("slug", BROKEN)
def test_a_broken_plugin_is_in_quarantine_and_the_good_ones_are_listed(
    slug: str, install: Callable[..., Any]
) -> None:
    phase, code, words = BROKEN[slug]
    install("good", GOOD.replace("{slug}", "good"))
    install(slug, code)
    registry = plugins.registry()
    (fault,) = [f for f in registry.quarantine if f.entry.name == slug]
    assert words in fault.error
    assert len(fault.error) < 400
    assert "\n" not in fault.error
    assert fault.phase == phase
    assert registry.find("loss", "good")
    assert registry.find("loss", "kd")
    with pytest.raises(InputError, match="quarantine") as caught:
        registry.find("loss", slug, "loss.0.use")
    assert caught.value.place == "loss.0.use"
    assert len(str(caught.value).splitlines()) < 10


def test_a_module_that_is_missing(install: Callable[..., Any]) -> None:
    entry = install("lost", "")
    object.__setattr__(entry, "target", "no_such_module_at_all")
    plugins.registry.cache_clear()
    assert [f.phase for f in plugins.registry().quarantine if f.entry.name == "lost"] == ["import"]


@pytest.mark.parametrize(
    "needs",
    [
        "kdcore>=99",
        "kdcore (>=0.1.1)",
        "kdcore (<0.0.1)",
        "kdcore==99.*; python_version > '3'",
        "kdcore[demo]!=0.1.0",
    ],
)
def test_a_plugin_for_another_core(needs: str, install: Callable[..., Any]) -> None:
    install("future", GOOD.replace("{slug}", "future"), requires=(needs,))
    (fault,) = [f for f in plugins.registry().quarantine if f.entry.name == "future"]
    assert fault.phase == "version"
    assert "needs kdcore" in fault.error


@pytest.mark.parametrize(
    "needs",
    [
        "kdcore",
        "kdcore>=0.1",
        "kdcore (>=0.1.0)",
        "kdcore[demo]>=0.1,<1",
        "kdcore>=99; python_version < '3'",
        "kdcore>=99; extra == 'later'",
        "kdcore @ file:///somewhere",
        "kdcore-extras>=99",
        "kdcore.extras>=99",
        "numpy>=99",
    ],
)
def test_ranges_that_fit_and_requirements_of_others(needs: str, install: Callable[..., Any]) -> None:
    install("fits", GOOD.replace("{slug}", "fits"), requires=(needs,))
    assert not [f for f in plugins.registry().quarantine if f.entry.name == "fits"]


def test_a_damaged_installation_is_pointed_at_and_the_others_are_found() -> None:
    class Point:
        name, value, dist = "damaged", "no_such_module", None

    entry = plugins._entry(Point())  # type: ignore[arg-type]
    registry = plugins.discover([*plugins._entry_points(), entry])
    assert [(f.entry.name, f.entry.distribution, f.phase) for f in registry.quarantine] == [
        ("damaged", "unknown", "import")
    ]
    assert registry.find("loss", "kd")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Entry]]:
    """Make a plugin that is a package with a heavy module ``loss``; its light module begins with a line."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def make(line: str) -> Entry:
        name = f"kd_plugin_made_{len(made)}"
        made.append(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "loss.py").write_text("import torch\ndef helper(): ...", "utf-8")
        code = f"{HEAD}{line}\n@hookimpl\ndef kd_losses():\n    yield Component('made', '{name}.loss:helper')"
        (tmp_path / name / "__init__.py").write_text(code, "utf-8")
        importlib.invalidate_caches()
        return Entry("made", "kd-plugin-made", "0.1", name)

    yield make
    for name in [each for each in sys.modules if each.partition(".")[0] in made]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "import torch.nn as nn",
        "from torch.nn import Linear",
        "from torch import float32 as kept, nn",
        "from kdcore import Loss",
        "from kdcore.kinds import frozen",
        "from kdcore.losses import kd_loss",
        "from .loss import helper",
    ],
)
def test_a_heavy_module_shows_though_torch_is_imported_already(
    line: str, package: Callable[[str], Entry]
) -> None:
    importlib.import_module("kdcore.losses")
    (fault,) = plugins.discover([package(line)]).quarantine
    assert fault.phase == "import"
    assert "import it inside the component's own module" in fault.error


@pytest.mark.parametrize("line", ["", "from kdcore import lazy, InputError", "import kdcore, json, pathlib"])
def test_a_light_module_stays_light_when_its_parts_are_imported_later(
    line: str, package: Callable[[str], Entry]
) -> None:
    entry = package(line)
    assert not plugins.discover([entry]).quarantine
    importlib.import_module(f"{entry.target}.loss")
    assert not plugins.discover([entry]).quarantine


def test_what_is_hidden_from_light_modules_is_back_afterwards(package: Callable[[str], Entry]) -> None:
    importlib.import_module("kdcore.losses")
    before = {n: m for n, m in sys.modules.items() if n.startswith(("torch", "kdcore"))}
    plugins.discover([package("import torch")])
    assert {n: m for n, m in sys.modules.items() if n.startswith(("torch", "kdcore"))} == before
    assert None not in sys.modules.values()


def test_a_hook_that_imports_torch_when_it_is_asked(install: Callable[..., Any]) -> None:
    install("asking", HEAD + "@hookimpl\ndef kd_losses():\n    import torch.nn\n    return []")
    (fault,) = [f for f in plugins.registry().quarantine if f.entry.name == "asking"]
    assert fault.phase == "declare"
    assert fault.error.startswith("imports torch")


def test_what_a_plugin_prints_does_not_spoil_what_is_listed(
    install: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code = GOOD.replace("{slug}", "noisy").replace("yield", "print('hello')\n        yield")
    install("noisy", f"print('imported')\n{textwrap.dedent(code)}")
    assert plugins.registry().find("loss", "noisy")
    said = capsys.readouterr()
    assert (said.out, "imported" in said.err, "hello" in said.err) == ("", True, True)


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit(4)", "import no_such_module", "x = 1"])
def test_a_component_whose_module_fails_is_fatal_only_where_it_is_named(
    code: str, install: Callable[..., Any], write_module: Callable[..., str], tiny: dict[str, Any]
) -> None:
    module = write_module(code)
    install("late", GOOD.replace("{slug}", "late").replace("kdcore.losses:kd_loss", f"{module}:loss"))
    kdcore.check(tiny)
    tiny["loss"][0] = {"use": "late"}
    with pytest.raises(InputError, match="cannot import") as caught:
        kdcore.check(tiny)
    assert caught.value.place == "loss.0.use"


def test_only_recipes_that_name_the_broken_plugin_fail(
    install: Callable[..., Any], tiny: dict[str, Any]
) -> None:
    for slug, (_, code, _) in BROKEN.items():
        install(slug, code)
    assert {f.entry.name for f in plugins.registry().quarantine} == set(BROKEN)
    kdcore.check(tiny)
    for slug in BROKEN:
        tiny["loss"][0] = {"use": slug}
        with pytest.raises(InputError, match="quarantine"):
            kdcore.check(tiny)


def test_one_name_from_two_distributions(install: Callable[..., Any]) -> None:
    install("same", GOOD.replace("{slug}", "same"), distribution="kd-plugin-same")
    install("same", GOOD.replace("{slug}", "same"), distribution="other-same")
    registry = plugins.registry()
    with pytest.raises(InputError, match="offered by 2 plugins") as caught:
        registry.find("loss", "same")
    assert "kd-plugin-same:same, other-same:same" in str(caught.value)
    assert registry.find("loss", "other-same:same")[0].distribution == "other-same"
    told = {entry.distribution: words for entry, words in registry.clashes()}
    assert told.keys() == {"kd-plugin-same", "other-same"}
    assert "'same' is offered by 2 plugins: write other-same:same" in told["other-same"]


def test_allow_and_block_lists_act_before_any_import(
    install: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("mine", GOOD.replace("{slug}", "mine"))
    install("loud", "raise SystemExit('imported')")
    monkeypatch.setenv("KD_DISABLE_PLUGINS", "loud, nothing")
    plugins.registry.cache_clear()
    registry = plugins.registry()
    assert not [f for f in registry.quarantine if f.entry.name == "loud"]
    with pytest.raises(InputError, match="blocked by"):
        registry.find("loss", "loud")
    monkeypatch.setenv("KD_PLUGINS", "mine")
    plugins.registry.cache_clear()
    assert {e.name for e in plugins.registry().entries} == {"kdcore", "mine"}
    monkeypatch.setenv("KD_PLUGINS", "")
    plugins.registry.cache_clear()
    assert {e.name for e in plugins.registry().entries} == {"kdcore"}


def test_names_that_are_not_there() -> None:
    registry = plugins.registry()
    with pytest.raises(InputError, match="unknown loss") as caught:
        registry.find("loss", "pdl")
    assert "did you mean 'pld'?" in str(caught.value)
    for word, meant in {"dkd": "'classics.dkd'", "classics": "'classics.at' or 'classics.crd' or"}.items():
        with pytest.raises(InputError) as caught:
            registry.find("loss", word)
        assert f"did you mean {meant}" in str(caught.value)
    with pytest.raises(InputError, match="is of kind teacher or student, not loss"):
        registry.find("loss", "module")
    with pytest.raises(InputError) as caught:
        registry.find("loss", "swing")  # catalogued, not written yet
    assert "planned" in str(caught.value)


def test_listing_imports_no_torch_and_no_pydantic() -> None:
    code = (
        "import sys; from kdcore.cli import main\n"
        "for args in (['list'], ['plugins'], ['search', 'ranking'], ['--help'], ['run', '--help']):\n"
        "    try: main(args)\n"
        "    except SystemExit as e: assert not e.code, (args, e.code)\n"
        "bad = [m for m in ('torch', 'pydantic', 'mmengine', 'transformers') if m in sys.modules]\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Plackett-Luce" in done.stdout


@pytest.mark.parametrize(
    ("slug", "kind", "hook"),
    [("distill", "stage", "kd_stages"), ("kd", "loss", "kd_losses"), ("module", "student", "kd_students")],
)
def test_a_name_of_the_cores_own_stays_the_cores(
    slug: str, kind: str, hook: str, install: Callable[..., Any], tiny: dict[str, Any]
) -> None:
    install(slug, GOOD.replace("{slug}", slug).replace("kd_losses", hook))
    (fault,) = plugins.registry().quarantine
    assert (fault.entry.name, fault.phase) == (slug, "declare")
    assert f"{slug!r} is the core's own: the plugin needs another name" in fault.error
    kdcore.check(tiny)  # names kd, module and, by default, distill
    assert plugins.registry().find(kind, slug)[0].distribution == "kdcore"


def test_what_an_import_changes_is_put_back(install: Callable[..., Any]) -> None:
    here, filters = Path.cwd(), list(warnings.filters)
    install("mover", "import os, warnings\nos.chdir('/')\nwarnings.simplefilter('ignore')")
    assert not plugins.registry().quarantine
    assert (Path.cwd(), list(warnings.filters)) == (here, filters)


def test_a_folder_that_was_deleted_stops_no_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., Any]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    install("good", GOOD.replace("{slug}", "good"))
    assert plugins.registry().find("loss", "good")


def test_ctrl_c_says_which_plugin_was_being_imported(
    install: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    install("endless", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugins.registry()
    said = capsys.readouterr().err
    assert "'endless' was imported: KD_DISABLE_PLUGINS=endless leaves it out" in said


@pytest.mark.parametrize("variable", ["KD_PLUGINS", "KD_DISABLE_PLUGINS"])
def test_a_name_in_a_list_that_is_no_plugins_is_said(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "pld, clasics,")
    plugins.discover(plugins._entry_points())
    (line,) = capsys.readouterr().err.splitlines()
    assert "not installed: 'clasics'. did you mean 'classics'?" in line
