"""DCD: the teacher picks the hard negatives of a small cross-encoder; entropy weighs its losses (arXiv 2207.01426)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    hard_list="select",
    HardNegatives="select",
    dcd_loss="loss",
    wsl_loss="loss",
    entropy_share="loss",
    DCD="loss",
    LayerCopy="student",
    MeanRecall="metrics",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "dcd", "kd_plugin_dcd.loss:DCD", "match scores and labels, weighed by the teacher's entropy"
    )
    yield Component("dcd.wsl", "kd_plugin_dcd.loss:WSL", "match scores, weighed by how far the student lags")


@hookimpl
def kd_augmentations() -> Iterator[Component]:
    yield Component(
        "dcd",
        "kd_plugin_dcd.select:HardNegatives",
        "of many candidates, those that the teacher finds hardest",
    )


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component(
        "dcd",
        "kd_plugin_dcd.student:LayerCopy",
        "a pair scorer that starts with some of the teacher's layers",
    )
