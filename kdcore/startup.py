"""A quicker start of the command line: libraries import others in case somebody wants them, and no recipe does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEAVY = "transformers"  # torchmetrics imports it for scores of texts, mmengine for an optimiser: a fifth of a start
enabled = False
"""Set by the command line, which owns its process; in somebody else's all of torchmetrics is imported."""


@contextmanager
def lean() -> Iterator[None]:
    """torchmetrics and mmengine imported in this block do without transformers, unless that is there already."""
    if not enabled or HEAVY in sys.modules:
        yield
        return
    from lightning_utilities.core.imports import RequirementCache

    real: Any = RequirementCache.__bool__

    def without(self: Any) -> bool:
        return not str(self.requirement).startswith(HEAVY) and bool(real(self))

    RequirementCache.__bool__ = without  # type: ignore[method-assign]
    sys.modules[HEAVY] = None  # type: ignore[assignment] # importing it is an ImportError, which mmengine expects
    try:
        yield
    finally:
        del sys.modules[HEAVY]
        RequirementCache.__bool__ = real  # type: ignore[method-assign]
