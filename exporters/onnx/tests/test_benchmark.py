"""Benchmarks: who is measured, where, and what is said about those that are not. No times are asserted."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from kd_exporter_onnx import ArtefactError, bench, export
from torch import nn


def test_student_and_teacher_against_the_artefact(
    shipped: Path, trained: nn.Module, students: SimpleNamespace
) -> None:
    found = bench(
        shipped,
        trained,
        students.Cnn().eval(),
        batches=(1, 4, 128),
        threads=1,
        rounds=2,
        runs=2,
        compiled=False,
    )
    assert {(row.backend, row.batch) for row in found.rows} == {
        (backend, batch) for backend in ("onnxruntime", "torch-eager", "teacher-eager") for batch in (1, 4)
    }
    assert all(row.runs == 4 and 0 < row.min_ms <= row.p50_ms <= row.p95_ms for row in found.rows)
    assert list(found.placement) == ["CPUExecutionProvider"]
    assert (
        found.placement["CPUExecutionProvider"]["Conv"]
        + found.placement["CPUExecutionProvider"].get("FusedConv", 0)
        >= 1
    )
    assert "onnxruntime" in str(found)
    assert found.row("onnxruntime", 4).device == "cpu"


def test_a_backend_that_fails_is_named_with_its_reason(shipped: Path) -> None:
    class Broken(nn.Module):
        def forward(self, image: object) -> None:
            raise RuntimeError("no kernel")

    found = bench(shipped, Broken(), batches=(1,), threads=1, rounds=1, runs=1, compiled=False)
    assert found.missing == {"torch-eager": "RuntimeError: no kernel"}
    assert [row.backend for row in found.rows] == ["onnxruntime"]


def test_batches_that_the_artefact_refuses(shipped: Path) -> None:
    with pytest.raises(ArtefactError, match=r"none of the batch sizes \[100\] is allowed: 1 to 64"):
        bench(shipped, batches=(100,))


def test_an_export_measures_itself(tmp_path: Path, flat_spec: object, students: SimpleNamespace) -> None:
    module = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval()
    export(module, flat_spec(), tmp_path / "out")
    rows = json.loads((tmp_path / "out/benchmark.json").read_text())["rows"]
    assert {(row["backend"], row["batch"]) for row in rows} == {("onnxruntime", 1), ("torch-eager", 1)}


@pytest.mark.slow
def test_torch_compile_is_measured_too(shipped: Path, trained: nn.Module) -> None:
    found = bench(shipped, trained, batches=(2,), threads=1, rounds=1, runs=1)
    assert {row.backend for row in found.rows} == {"onnxruntime", "torch-eager", "torch-compile"}
