"""``kd doctor`` names what will make trouble."""

from __future__ import annotations

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
