"""SinKD: optimal transport between the batch's student and teacher distributions (arXiv 2402.17110)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    sinkd_loss="loss",
    sinkhorn_plan="loss",
    sinkhorn_distance="loss",
    annealed_temperature="kl",
    soft_cross_entropy="kl",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component("sinkd", "kd_plugin_sinkd.loss:sinkd_loss", "Sinkhorn distance between two sets of rows")
    yield Component(
        "sinkd.kl", "kd_plugin_sinkd.kl:SoftCrossEntropy", "the sample-wise term beside it, annealed or not"
    )
    yield Component(
        "sinkd.shuffled",
        "kd_plugin_sinkd.kl:Shuffled",
        "control: a loss with each teacher row at the wrong sample",
    )
