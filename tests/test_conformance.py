"""Every installed plugin and every check: one case each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kdcore import plugins
from kdcore.testing import Finding, parametrize

CASES = [case for entry in plugins.registry().entries for case in parametrize(entry.name).args[1]]


@pytest.mark.parametrize("check", CASES)
def test_plugin_conforms(check: Callable[[], Finding]) -> None:
    check()


def test_every_plugin_has_its_cases() -> None:
    slugs = {entry.name for entry in plugins.registry().entries}
    assert "kdcore" in slugs
    assert {f"{slug}-naming" for slug in slugs} <= {case.id for case in CASES}
