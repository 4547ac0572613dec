"""TAID: forward KL towards a target that starts near the student and slides to the teacher."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(__name__, taid_loss="loss", next_t="loss")


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "taid",
        "kd_plugin_taid.loss:TAIDLoss",
        summary="token divergence to a target that slides from student to teacher",
    )
