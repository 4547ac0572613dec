"""DHO: one head learns labels, one the teacher; their probabilities are mixed at test time (arXiv 2505.07675)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(__name__, dho_loss="loss", mix="student", search="student", DualHead="student")


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component(
        "dho", "kd_plugin_dho.student:DualHead", "any backbone with a label head and a teacher head"
    )


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component("dho", "kd_plugin_dho.loss:DHOLoss", "distillation on the teacher head, on every stream")
    yield Component(
        "dho.pcgrad", "kd_plugin_dho.loss:PCGrad", "baseline: one head, gradient conflicts projected away"
    )
