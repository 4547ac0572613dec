"""TopKLD: a quantised token model learns from itself, one KL direction on the top K tokens, one on the rest (2501.06218)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    topkld_loss="loss",
    cakld_loss="loss",
    quantise="quantiser",
    FakeQuantise="quantiser",
    model_bits="quantiser",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    where = "kd_plugin_topkld.loss"
    yield Component(
        "topkld", f"{where}:topkld_loss", "one KL direction on the teacher's top K, the other on the rest"
    )
    yield Component(
        "topkld.cakld", f"{where}:CAKLD", "BitDistiller's mix of both directions, by the teacher's confidence"
    )


@hookimpl
def kd_students() -> Iterator[Component]:
    summary = "any student with fake-quantised weights and a straight-through gradient"
    yield Component("topkld", "kd_plugin_topkld.student:Quantised", summary)


@hookimpl
def kd_probes() -> Iterator[Component]:
    yield Component(
        "topkld.bits", "kd_plugin_topkld.probes:Bits", "the student's size in bits, by the quantisers"
    )
    summary = "samples of a raster of tokens: Frechet distance, class accuracy; KL from the teacher"
    yield Component("topkld.samples", "kd_plugin_topkld.probes:Samples", summary)
