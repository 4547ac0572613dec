"""LELP: few classes become many, along the principal directions of the teacher's embeddings (arXiv 2409.20449)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    lelp_loss="loss",
    lelp_targets="loss",
    fit_subspaces="subspaces",
    null_space="subspaces",
    split_within="subspaces",
    Subspaces="subspaces",
)


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component(
        "lelp",
        "kd_plugin_lelp.student:Subclassed",
        "any classifier with S outputs a class, summed at inference",
    )


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "lelp", "kd_plugin_lelp.loss:LELPLoss", "cross-entropy to the teacher's pseudo-subclasses"
    )
    yield Component(
        "lelp.given", "kd_plugin_lelp.loss:GivenSplit", "control: the same loss with subclasses from the data"
    )


@hookimpl
def kd_stages() -> Iterator[Component]:
    yield Component("lelp.fit", "kd_plugin_lelp.stages:Fit", "the subspaces of a trained teacher, as a file")
