"""config.pbtxt, word for word. Parsed once with Triton's own protobuf (tritonclient, model_config_pb2)."""

from pathlib import Path
from typing import Any

import pytest
from kd_exporter_onnx import Artefact, triton


@pytest.fixture
def described(shipped: Path) -> Any:
    whole = Artefact.model_validate_json((shipped / "artefact.json").read_text())
    return lambda **changes: Artefact.model_validate(whole.model_dump() | changes)


def test_a_batched_model(shipped: Path) -> None:
    assert (shipped / "triton/digits/config.pbtxt").read_text() == (
        'name: "digits"\n'
        'backend: "onnxruntime"\n'
        "max_batch_size: 64\n"
        'input [ { name: "image" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] } ]\n'
        'output [ { name: "logits" data_type: TYPE_FP32 dims: [ 10 ] } ]\n'
        "dynamic_batching { }\n"
        "instance_group [ { kind: KIND_CPU } ]\n"
    )


def test_the_model_is_the_same_file(shipped: Path) -> None:
    assert (shipped / "triton/digits/1/model.onnx").samefile(shipped / "model.onnx")


def test_a_copy_where_links_are_not_possible(
    shipped: Path, tmp_path: Path, described: Any, monkeypatch: Any
) -> None:
    def no_links(*_: object) -> None:
        raise OSError("no hard links on this file system")

    monkeypatch.setattr(triton.os, "link", no_links)
    (tmp_path / "model.onnx").write_bytes(b"model")
    triton.write(tmp_path, described())
    assert (tmp_path / "triton/digits/1/model.onnx").read_bytes() == b"model"


def test_dynamic_axes_and_a_gpu(described: Any) -> None:
    tensors = [
        {"name": "ids", "dtype": "int64", "shape": ["batch", "length"]},
        {"name": "mask", "dtype": "bool", "shape": ["batch", "length"]},
    ]
    config = triton.config(described(inputs=tensors, target="tensorrt"))
    assert 'input [ { name: "ids" data_type: TYPE_INT64 dims: [ -1 ] } ]\n' in config
    assert 'input [ { name: "mask" data_type: TYPE_BOOL dims: [ -1 ] } ]\n' in config
    assert "instance_group [ { kind: KIND_GPU } ]" in config
    assert 'gpu_execution_accelerator [ { name: "tensorrt" } ]' in config


def test_without_a_common_batch_axis_triton_forms_no_batches(described: Any) -> None:
    config = triton.config(described(outputs=[{"name": "boxes", "dtype": "float32", "shape": ["count", 4]}]))
    assert "max_batch_size: 0\n" in config
    assert 'input [ { name: "image" data_type: TYPE_FP32 dims: [ -1, 1, 8, 8 ] } ]' in config
    assert "dynamic_batching" not in config


def test_one_value_for_each_sample(described: Any) -> None:
    config = triton.config(described(outputs=[{"name": "score", "dtype": "float32", "shape": ["batch"]}]))
    assert 'output [ { name: "score" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } } ]' in config
