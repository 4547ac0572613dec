"""OpenMMLab's 3D detectors as teachers and students: an mmdetection3d config, its bird's-eye-view maps by name."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    MMDet3DTeacher="models",
    MMDet3DStudent="models",
    NuScenesMAP="metric",
    load_detector="load",
    scenes="synthetic",
)


@hookimpl
def kd_teachers() -> Iterator[Component]:
    yield Component(
        "mmdet3d",
        "kd_plugin_mmdet3d.models:MMDet3DTeacher",
        "a 3D detector of mmdetection3d, from its config",
    )


@hookimpl
def kd_students() -> Iterator[Component]:
    yield Component(
        "mmdet3d",
        "kd_plugin_mmdet3d.models:MMDet3DStudent",
        "a 3D detector of mmdetection3d, from its config",
    )
