"""Declares the ONNX exporter to kdcore; imports no torch."""

from collections.abc import Iterator

from kdcore import Component, hookimpl


@hookimpl
def kd_exporters() -> Iterator[Component]:
    yield Component(
        "onnx",
        "kd_exporter_onnx.request:RecipeExporter",
        summary="verified ONNX artefact: refused when any gate fails, loadable without torch",
    )
