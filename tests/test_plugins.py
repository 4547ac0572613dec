"""Discovery: broken plugins beside good ones, clashes, allow and block lists."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kdcore import plugins
from kdcore.errors import InputError

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
    "torchy": ("", "import torch", "torch"),
    "misspelt": ("hooks", HEAD + "@hookimpl\ndef kd_los():\n    return []", "kd_los"),
    "unmarked": ("declare", HEAD + "def kd_losses():\n    return []", "not marked"),
    "argument": ("hooks", HEAD + "@hookimpl\ndef kd_losses(config):\n    return []", "config"),
    "rubbish": ("declare", HEAD + "@hookimpl\ndef kd_losses():\n    return [42]", "not a Component"),
    "notiterable": ("declare", HEAD + "@hookimpl\ndef kd_losses():\n    return 42", "int"),
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
    assert fault.phase == phase or (not phase and fault.phase in ("import", "light"))
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


@pytest.mark.parametrize("needs", ["kdcore>=99", "kdcore (<0.0.1)", "kdcore==99.*; python_version > '3'"])
def test_a_plugin_for_another_core(needs: str, install: Callable[..., Any]) -> None:
    install("future", GOOD.replace("{slug}", "future"), requires=(needs,))
    (fault,) = [f for f in plugins.registry().quarantine if f.entry.name == "future"]
    assert fault.phase == "version"
    assert "needs kdcore" in fault.error


def test_a_range_that_fits_and_other_requirements_are_fine(install: Callable[..., Any]) -> None:
    install("fits", GOOD.replace("{slug}", "fits"), requires=("kdcore>=0.1", "kdcore-extras>=99", "numpy"))
    assert plugins.registry().find("loss", "fits")


def test_one_name_from_two_distributions(install: Callable[..., Any]) -> None:
    install("same", GOOD.replace("{slug}", "same"), distribution="kd-plugin-same")
    install("same", GOOD.replace("{slug}", "same"), distribution="other-same")
    registry = plugins.registry()
    with pytest.raises(InputError, match="offered by 2 plugins") as caught:
        registry.find("loss", "same")
    assert "kd-plugin-same:same, other-same:same" in str(caught.value)
    assert registry.find("loss", "other-same:same")[0].distribution == "other-same"


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
    with pytest.raises(InputError, match="is a teacher, not a loss"):
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
