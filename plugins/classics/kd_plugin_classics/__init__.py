"""The losses that others are compared with: FitNet, attention transfer, RKD, DKD, DIST and CRD."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    hint_loss="fitnet",
    regressor="fitnet",
    at_loss="at",
    attention_map="at",
    rkd_loss="rkd",
    distance_loss="rkd",
    angle_loss="rkd",
    dkd_loss="dkd",
    dist_loss="dist",
    nce_loss="crd",
    MemoryBank="bank",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    here = __name__
    yield Component(
        "classics.fitnet", f"{here}.fitnet:FitNet", "FitNets: the teacher's features, through a regressor"
    )
    yield Component(
        "classics.at", f"{here}.at:at_loss", "attention transfer: where the feature maps are active"
    )
    yield Component(
        "classics.rkd", f"{here}.rkd:rkd_loss", "RKD: distances and angles between the batch's samples"
    )
    yield Component(
        "classics.dkd", f"{here}.dkd:dkd_loss", "decoupled KD: target and non-target classes apart"
    )
    yield Component(
        "classics.dist", f"{here}.dist:dist_loss", "DIST: correlation of the rows and of the columns"
    )
    yield Component("classics.crd", f"{here}.crd:CRD", "CRD: contrast with a memory of the training samples")
