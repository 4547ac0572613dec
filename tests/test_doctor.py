"""``kd doctor`` names what will make trouble."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from kdcore import doctor


def test_a_broken_plugin_is_a_problem(install: Callable[..., Any]) -> None:
    before: list[str] = []
    count = doctor.report(before.append)
    install("broken", "raise RuntimeError('on purpose')")
    lines: list[str] = []
    assert doctor.report(lines.append) == count + 1
    assert any("broken is in quarantine (import)" in line and "on purpose" in line for line in lines)


def test_two_runtimes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    lines: list[str] = []
    assert doctor.report(lines.append) >= 1
    assert any("overwrite each other" in line for line in lines)


OFFER = """
    from kdcore import Component, hookimpl
    @hookimpl
    def kd_losses():
        yield Component("{slug}", "{target}")
"""


def told() -> list[str]:
    lines: list[str] = []
    doctor.report(lines.append)
    return lines


def test_one_name_of_two_plugins_is_a_problem(install: Callable[..., Any]) -> None:
    for distribution in ("kd-plugin-dup", "other-dup"):
        install("dup", OFFER.format(slug="dup", target="kdcore.losses:kd_loss"), distribution=distribution)
    lines = [line for line in told() if line.startswith("problem: plugin dup")]
    assert len(lines) == 2
    assert "dup of kd-plugin-dup: loss 'dup' is offered by 2 plugins: write kd-plugin-dup:dup" in lines[0]


@pytest.mark.parametrize("target", ["no_such_package.loss:f", "kdcore.nosuch:f"])
def test_a_component_whose_module_is_not_there_is_a_problem(target: str, install: Callable[..., Any]) -> None:
    install("lost", OFFER.format(slug="lost", target=target))
    module = target.partition(":")[0]
    assert f"problem: plugin lost: loss 'lost' lies in {module}, which is not there" in told()


def test_a_plugin_that_is_slow_to_import_is_shown(install: Callable[..., Any]) -> None:
    install("slow", "import time\ntime.sleep(0.06)")
    assert any(re.fullmatch(r"  slow takes \d+ ms of every command", line) for line in told())
