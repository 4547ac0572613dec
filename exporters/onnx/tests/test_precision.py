"""fp16 and int8, judged by the metric."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from kd_exporter_onnx import ExportSpec, Refused, SpecError, export, load, precision, verify
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

Spec = Callable[..., ExportSpec]


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path / "model.onnx").graph.node}


def test_fp16_keeps_inputs_outputs_and_metric(
    tmp_path: Path, trained: nn.Module, digits_spec: Spec, digits: Any
) -> None:
    report = export(trained, digits_spec(), tmp_path / "out", precision="fp16", benchmark="none")
    model = onnx.load(tmp_path / "out/model.onnx")
    halves = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert len(halves) >= 4
    assert report.parity.metric.drop <= 0.01
    assert 1e-6 < report.parity.worst().difference < 1e-2
    assert load(tmp_path / "out")(digits.raw[:2])["logits"].dtype == np.float32
    assert verify(tmp_path / "out").differences["logits"] < 1e-2


def test_int8_of_a_cnn_is_static(
    tmp_path: Path, trained: nn.Module, digits_spec: Spec, shipped: Path
) -> None:
    report = export(
        trained, digits_spec(), tmp_path / "out", precision="int8", max_drop=0.02, benchmark="none"
    )
    assert report.artefact.quantisation == "static"
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= operators(tmp_path / "out")
    assert "DynamicQuantizeLinear" not in operators(tmp_path / "out")
    size, full = ((folder / "model.onnx").stat().st_size for folder in (tmp_path / "out", shipped))
    assert size < full + 3000  # this CNN is so small that scales weigh as much as what they save
    assert report.parity.metric.served > 0.9
    assert verify(tmp_path / "out").differences["logits"] == 0
    assert "int8 sums saturate" in (tmp_path / "out/README.md").read_text()


def test_int8_of_a_vit_is_dynamic(tmp_path: Path, accuracy: Any) -> None:
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32,
        patch_size=8, num_labels=5,
    )  # fmt: skip
    module = ViTForImageClassification(config).eval()
    images = np.random.default_rng(0).normal(size=(32, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        targets = module(torch.from_numpy(images)).logits.argmax(-1).numpy()
    spec = ExportSpec(
        inputs=[{"name": "pixel_values", "dtype": "float32", "shape": ("batch", 3, 32, 32)}],
        outputs=("logits",),
        axes={"batch": {"max": 8}},
        samples={"pixel_values": images},
        metric=accuracy,
        targets=targets,
    )
    report = export(module, spec, tmp_path / "out", precision="int8", max_drop=0.2, benchmark="none")
    assert report.artefact.quantisation == "dynamic"
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= operators(tmp_path / "out")
    assert report.parity.metric.reference == 1.0


def test_a_drop_above_the_bound_is_refused(tmp_path: Path, trained: nn.Module, digits_spec: Spec) -> None:
    """Calibrated on darkness, every activation saturates."""
    dark = {"image": np.full((32, 1, 8, 8), -0.857, np.float32)}
    with pytest.raises(Refused, match=r"accuracy is .* as served and .* in torch") as caught:
        export(trained, digits_spec(calibration=dark), tmp_path / "out", precision="int8", benchmark="none")
    assert caught.value.gate == "metric"
    assert caught.value.distance > 0.3
    assert list(tmp_path.iterdir()) == []


def test_static_int8_needs_calibration(tmp_path: Path, trained: nn.Module, digits_spec: Spec) -> None:
    with pytest.raises(SpecError, match="so int8 is static: give calibration"):
        export(trained, digits_spec(calibration=None), tmp_path / "out", precision="int8", benchmark="none")


@pytest.mark.parametrize(
    "body, expected",
    [
        ("y = Conv(x, w)", "static"),
        ("y = MatMul(x, w)", "dynamic"),
        ("a = Conv(x, w) b = MatMul(a, a) y = MatMul(b, x)", "dynamic"),
        ("a = MatMul(x, w) b = Conv(a, w) y = Conv(b, w)", "static"),
    ],
)
def test_how_int8_is_chosen(tmp_path: Path, body: str, expected: str) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20]> g (float[1, 1, 2, 2] x) => (float[1, 1, 2, 2] y)'
        f"<float[1, 1, 1, 1] w = {{1}}> {{ {body} }}"
    )
    onnx.save(model, tmp_path / "model.onnx")
    assert precision.choose_int8(tmp_path / "model.onnx") == expected


def test_a_wrong_graph_does_not_hide_behind_int8(tmp_path: Path, flat_spec: Spec, students: Any) -> None:
    """int8 values are judged by the metric only, so the fp32 graph is held to the student before."""
    module = students.Function(lambda y: y if y.shape[0] < 12 else 1.02 * y).eval()
    spec = flat_spec(metric=lambda outputs, _: 1.0)
    with pytest.raises(Refused) as caught:
        export(module, spec, tmp_path / "out", precision="int8", benchmark="none")
    assert caught.value.gate == "parity"
