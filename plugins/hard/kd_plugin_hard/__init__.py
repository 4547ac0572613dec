"""HARD: a trained augmentor makes inputs on which teacher and student disagree (arXiv 2305.14890)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    disagreement="loss",
    augmentor_loss="loss",
    HARD="augment",
    Affine="affine",
    Colour="colour",
    Generator="generator",
)


@hookimpl
def kd_augmentations() -> Iterator[Component]:
    yield Component(
        "hard", "kd_plugin_hard.augment:HARD", "views trained to make teacher and student disagree"
    )
    yield Component(
        "hard.affine", "kd_plugin_hard.affine:Affine", "random shift, rotation, scale and shear; trainable"
    )
    yield Component(
        "hard.colour", "kd_plugin_hard.colour:Colour", "random brightness, contrast, colours; trainable"
    )
    yield Component(
        "hard.generator", "kd_plugin_hard.generator:Generator", "a network edits the image; trainable"
    )
