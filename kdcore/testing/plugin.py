"""``check_plugin``: every check on everything that a plugin offers; for pytest too."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kdcore.errors import InputError, nearest
from kdcore.testing import augmentations, declarations, losses, models, routers  # noqa: F401 - their checks
from kdcore.testing.findings import CHECKS, Finding, checks_of, examine, excused
from kdcore.testing.opening import Plugin, opened
from kdcore.testing.subjects import Subject
from kdcore.types import Component


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
    with opened(where) as plugin, _one_thread():
        return excused(_findings(plugin, without), expected_failures or {}, plugin.slug)


def parametrize(where: str | os.PathLike[str], *, expected_failures: Mapping[str, str] | None = None) -> Any:
    """A pytest decorator: one case a check and component, as the argument ``check``; call it.

    ::

        @kdcore.testing.parametrize("my-method", expected_failures={"direction": "pushes away by design"})
        def test_conformance(check):
            check()
    """
    import pytest

    found: list[Finding] = []

    def case(name: str, component: str) -> Callable[[], Finding]:
        def run() -> Finding:
            if not found:
                found.extend(check_plugin(where, expected_failures=expected_failures))
            finding = next(f for f in found if (f.check, f.component) == (name, component))
            assert not finding.failed, str(finding)
            return finding

        return run

    with opened(where) as plugin:
        names = [(c.name, plugin.slug) for c in checks_of("plugin")]
        for kind, component in plugin.components:
            names += [(c.name, _title(kind, component)) for c in [*checks_of("component"), *checks_of(kind)]]
    return pytest.mark.parametrize("check", [pytest.param(case(*n), id=f"{n[1]}-{n[0]}") for n in names])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of a hundred numbers are quickest on one thread, on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _findings(plugin: Plugin, without: Collection[str]) -> list[Finding]:
    found = examine("plugin", plugin, plugin.slug, without)
    with tempfile.TemporaryDirectory() as folder:
        for kind, component in plugin.components:
            subject = Subject(plugin.entry, kind, component, plugin.recipes, Path(folder))
            mine = examine("component", subject, _title(kind, component), without)
            broken = next((f for f in mine if f.failed and f.check in ("imports", "kind", "schema")), None)
            if broken is None:
                mine += examine(kind, subject, _title(kind, component), without)
            else:
                why = f"{broken.check} failed: mend that first"
                mine += [Finding(c.name, broken.component, "skipped", why) for c in checks_of(kind)]
            expected = getattr(subject.target, "expected_failures", {}) if broken is None else {}
            found += excused(mine, expected, subject.name)
    return found


def _title(kind: str, component: Component) -> str:
    return f"{kind} {component.name}"
