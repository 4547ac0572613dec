"""PLD: one list-wise ranking loss that replaces cross-entropy plus a distillation term."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(__name__, pld_loss="loss", preference_order="loss")


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "pld", "kd_plugin_pld.loss:pld_loss", summary="Plackett-Luce list-wise loss on the teacher's ranking"
    )
