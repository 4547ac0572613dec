"""SgVA-CLIP: an adapter before CLIP's projection, guided by CLIP's own logits and fused with them (arXiv 2211.16191)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    guidance_loss="loss",
    vision_loss="loss",
    prototypes="adapter",
    Adapter="adapter",
    fuse="fusion",
    search="fusion",
    TwoTowers="clip",
    SgVA="student",
)


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component(
        "sgva-clip",
        "kd_plugin_sgva_clip.student:SgVA",
        "frozen CLIP, vision adapter, prototypes, fused scores",
    )


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "sgva-clip",
        "kd_plugin_sgva_clip.loss:guidance_loss",
        "CLIP's image-text distribution taught to the adapted image-text logits",
    )
