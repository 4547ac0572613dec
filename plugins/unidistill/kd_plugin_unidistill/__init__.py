"""UniDistill: a detector's bird's-eye-view maps taught to another sensor's, at the boxes only (arXiv 2303.15083)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    feature_loss="loss",
    relation_loss="loss",
    response_loss="loss",
    UniDistill="component",
    nine_points="geometry",
    sample="geometry",
    box_mask="geometry",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "unidistill", "kd_plugin_unidistill.component:UniDistill", "BEV maps and responses, at the boxes only"
    )
