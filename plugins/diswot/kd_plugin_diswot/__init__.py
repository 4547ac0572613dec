"""DisWOT: among students, the one that looks most like the teacher while neither is trained (arXiv 2303.15678)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    relation_distance="metrics",
    gradient_distance="metrics",
    activation_distance="metrics",
    class_maps="metrics",
    look="looks",
    distances="looks",
    gaussian_="looks",
    evolve="space",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "diswot", "kd_plugin_diswot.loss:DisWOTLoss", "relations of samples and class maps, as the teacher's"
    )


@hookimpl
def kd_stages() -> Iterator[Component]:
    yield Component(
        "diswot.search",
        "kd_plugin_diswot.search:Search",
        "chooses the student's arguments, before any training",
    )
