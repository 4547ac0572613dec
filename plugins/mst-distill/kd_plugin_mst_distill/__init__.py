"""MST-Distill: each sample routed among masked teachers that were trained with the student (arXiv 2507.07015)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__, mst_loss="loss", divergence="loss", load_balance="router", GateNet="router", MaskNet="masks"
)


@hookimpl
def kd_teachers() -> Iterator[Component]:
    yield Component(
        "mst-distill", "kd_plugin_mst_distill.masks:Specialised", "a teacher with masks on named layers"
    )


@hookimpl
def kd_routers() -> Iterator[Component]:
    yield Component(
        "mst-distill",
        "kd_plugin_mst_distill.router:Gate",
        "top-k teachers a sample, from the student's logits",
    )


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "mst-distill", "kd_plugin_mst_distill.loss:MSTLoss", "plain distillation with an epoch schedule"
    )


@hookimpl
def kd_stages() -> Iterator[Component]:
    module = "kd_plugin_mst_distill.stages"
    yield Component(
        "mst-distill.cotrain", f"{module}:CoTrain", "stage 1: teachers and student learn from each other"
    )
    yield Component(
        "mst-distill.specialise", f"{module}:Specialise", "stage 2: one mask a teacher, towards the student"
    )
    yield Component(
        "mst-distill.route", f"{module}:Route", "stage 3: distillation routed among the masked teachers"
    )
