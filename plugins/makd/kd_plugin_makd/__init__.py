"""MaKD: the classifier is widened by outputs that learn yes/no answers about the image, and cut again (2501.13341)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    makd_loss="loss",
    yes_probability="loss",
    released_correct="loss",
    WiderHead="student",
    Targets="targets",
    read_released="targets",
)


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component(
        "makd", "kd_plugin_makd.student:WiderHead", "any classifier, its head Q outputs wider while it trains"
    )


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "makd", "kd_plugin_makd.loss:makd_loss", "binary cross-entropy to the yes-probability of Q questions"
    )


@hookimpl
def kd_augmentations() -> Iterator[Component]:
    yield Component(
        "makd", "kd_plugin_makd.targets:SideTargets", "puts each sample's answers into the batch, by its id"
    )


@hookimpl
def kd_stages() -> Iterator[Component]:
    yield Component(
        "makd", "kd_plugin_makd.targets:Ask", "asks any callable the questions of every training image, once"
    )


@hookimpl
def kd_probes() -> Iterator[Component]:
    yield Component(
        "makd",
        "kd_plugin_makd.student:ReleasedAccuracy",
        "accuracy as the released evaluation counts it, beside ours",
    )
