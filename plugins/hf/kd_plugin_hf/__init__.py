"""Hugging Face Transformers models as teachers and students: a config or a local checkpoint, no download."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(__name__, HFTeacher="models", HFStudent="models", text="data")


@hookimpl
def kd_teachers() -> Iterator[Component]:
    yield Component(
        "hf", "kd_plugin_hf.models:HFTeacher", "a transformers model, from a local checkpoint or a config"
    )


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component(
        "hf", "kd_plugin_hf.models:HFStudent", "a transformers model, from a config or a local checkpoint"
    )
