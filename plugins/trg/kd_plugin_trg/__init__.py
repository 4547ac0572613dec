"""TRG: a graph of patch tokens across the batch, and each image's token context, taught to the student (2306.12442)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    token_graph="graph",
    local_loss="graph",
    global_loss="graph",
    contextual_loss="graph",
    context="graph",
    unit="graph",
    draw="tokens",
    tokens_of="tokens",
    same_grid="tokens",
    TRGLoss="loss",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "trg",
        "kd_plugin_trg.loss:TRGLoss",
        "neighbour graph of tokens across the batch, context inside each image",
    )


@hookimpl
def kd_probes() -> Iterator[Component]:
    yield Component(
        "trg", "kd_plugin_trg.probe:TokenRelations", "how far token neighbours and contexts are the teacher's"
    )
