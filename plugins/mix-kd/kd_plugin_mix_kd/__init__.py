"""MIX-KD: distillation on partly mixed batches, logits divided by their standard deviation (arXiv 2211.03946)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    mix_kd_loss="loss",
    rescale="loss",
    draw_pairs="mixup",
    mix="mixup",
    soft_labels="mixup",
    PartialMixup="mixup",
    Rescaled="student",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "mix-kd", "kd_plugin_mix_kd.loss:mix_kd_loss", "soft labels and the teacher, on rescaled logits"
    )


@hookimpl
def kd_augmentations() -> Iterator[Component]:
    yield Component("mix-kd", "kd_plugin_mix_kd.mixup:PartialMixup", "mixup of a share of each batch")


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component("mix-kd", "kd_plugin_mix_kd.student:Rescaled", "any student, judged on rescaled logits")
