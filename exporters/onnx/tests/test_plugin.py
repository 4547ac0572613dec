"""What kdcore sees of this package."""

import ast
from importlib import import_module, metadata
from inspect import signature
from pathlib import Path

import kd_exporter_onnx
from kd_exporter_onnx import plugin


def test_the_entry_point_declares_the_exporter() -> None:
    (component,) = plugin.kd_exporters()
    module, name = component.target.split(":")
    assert component.name == "onnx"
    exporter = getattr(import_module(module), name)
    parameters = signature(exporter.__init__).parameters.values()
    assert {p.kind.name for p in parameters if p.name != "self"} == {"KEYWORD_ONLY"}
    assert all(p.annotation is not p.empty for p in parameters if p.name != "self")


def test_it_is_installed_under_its_names() -> None:
    (point,) = metadata.entry_points(group="kdcore", name="onnx")
    assert point.value == "kd_exporter_onnx.plugin"
    (script,) = metadata.entry_points(group="console_scripts", name="kd-verify")
    assert script.value == "kd_exporter_onnx.verification:main"
    assert callable(script.load())
    assert metadata.version("kd-exporter-onnx") == kd_exporter_onnx.__version__


def test_serving_modules_import_no_torch_kdcore_or_onnx() -> None:
    """Module-level and inner imports alike; bench_worker has torch inside the branch that times torch."""
    folder = Path(kd_exporter_onnx.__file__).parent
    for name in (
        "__init__",
        "artefact",
        "compare",
        "errors",
        "preprocess",
        "providers",
        "records",
        "replay",
        "runtime",
        "verification",
    ):
        tree = ast.parse((folder / f"{name}.py").read_text())
        imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {i.split(".")[0] for i in imported} & {"torch", "kdcore", "onnx", "transformers"}, name
