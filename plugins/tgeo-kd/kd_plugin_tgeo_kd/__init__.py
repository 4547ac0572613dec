"""TGeo-KD: how far each sample trusts teacher or label, learned by bilevel optimisation (arXiv 2312.15112)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    trilateral="geometry",
    class_means="geometry",
    FusionRatio="geometry",
    fused_loss="loss",
    look_ahead="bilevel",
)


@hookimpl
def kd_routers() -> Iterator[Component]:
    summary = "teacher or label, sample by sample: a ratio from their geometry, learned on held-out labels"
    yield Component("tgeo-kd", "kd_plugin_tgeo_kd.router:TGeoKD", summary)
