"""PCoreSet: labels are bought where the student's probabilities lie farthest from all labelled ones (arXiv 2506.00910)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__, farthest_first="selection", select="selection", Buyer="augment", ActiveRounds="stages"
)


@hookimpl
def kd_augmentations() -> Iterator[Component]:
    yield Component(
        "pcoreset", "kd_plugin_pcoreset.augment:Buyer", "draws labelled samples, and buys the next"
    )


@hookimpl
def kd_stages() -> Iterator[Component]:
    yield Component(
        "pcoreset.rounds",
        "kd_plugin_pcoreset.stages:ActiveRounds",
        "a fresh student a round, on all labels so far",
    )
