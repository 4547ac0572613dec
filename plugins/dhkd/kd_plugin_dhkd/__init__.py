"""DHKD: a throw-away second head takes the logit-level loss, the real head keeps cross-entropy (arXiv 2411.08937)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__, binary_kl="loss", binary_kl_norm="loss", align="loss", auxiliary_head="loss", DHKD="loss"
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "dhkd", "kd_plugin_dhkd.loss:DHKD", "BinaryKL-Norm on an auxiliary head, with gradient alignment"
    )
