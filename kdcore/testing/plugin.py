"""``check_plugin``: every check on everything that a plugin offers; for pytest too."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from kdcore.errors import InputError, nearest
from kdcore.testing import augmentations, declarations, losses, models, routers  # noqa: F401 - their checks
from kdcore.testing.findings import CHECKS, Finding, checks_of, examine, excused
from kdcore.testing.opening import opened
from kdcore.testing.subjects import Subject


def check_plugin(
    where: str | os.PathLike[str],
    *,
    expected_failures: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> list[Finding]:
    """The findings of every check on a plugin: by its slug, or a folder with a pyproject.toml, installed or not.

    ``without``: checks to leave out (``recipe_runs`` and ``exports`` take seconds). ``expected_failures``: checks
    to reasons; their failures are skipped, and one that passes is a failure. A component may carry such a
    mapping as an attribute of its own.
    Raises InputError where there is no such plugin.
    """
    for name in without:
        if name not in CHECKS:
            raise InputError("without", "no such check", given=name, hint=nearest(name, CHECKS))
    with opened(where) as plugin, tempfile.TemporaryDirectory() as folder:
        found = examine("plugin", plugin, plugin.entry.name, without)
        for kind, component in plugin.components:
            subject = Subject(plugin, kind, component, Path(folder))
            mine = examine(kind, subject, f"{kind} {component.name}", without)
            imported = not any(each.failed for each in mine if each.check == "imports")
            own = getattr(subject.target, "expected_failures", {}) if imported else {}
            found += excused(mine, own, subject.name)
        return excused(found, expected_failures or {}, plugin.entry.name)


def parametrize(where: str | os.PathLike[str], *, expected_failures: Mapping[str, str] | None = None) -> Any:
    """A pytest decorator: one case a check and component, as the argument ``check``; call it.

    ::

        @kdcore.testing.parametrize("my-method", expected_failures={"direction": "pushes away by design"})
        def test_conformance(check):
            check()
    """
    import pytest

    found: list[Finding] = []

    def case(name: str, title: str) -> Callable[[], Finding]:
        def run() -> Finding:
            if not found:
                found.extend(check_plugin(where, expected_failures=expected_failures))
            finding = next(each for each in found if (each.check, each.component) == (name, title))
            assert not finding.failed, str(finding)
            return finding

        return run

    with opened(where) as plugin:
        titles = [("plugin", plugin.entry.name), *((k, f"{k} {c.name}") for k, c in plugin.components)]
    names = [(check.name, title) for kind, title in titles for check in checks_of(kind)]
    cases = [pytest.param(case(name, title), id=f"{title}-{name}") for name, title in names]
    return pytest.mark.parametrize("check", cases)
