"""Digests, the description, and the checks of inputs."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kd_exporter_onnx import Artefact, ArtefactError, Axis, InputError, SpecError, TensorSpec, load
from kd_exporter_onnx import artefact as module
from kd_exporter_onnx.artefact import check_arrays, json_schema, seal, sha256


def test_the_published_schema_is_the_models() -> None:
    published = Path(module.__file__).with_name("artefact.schema.json")
    assert published.read_text() == json_schema()


def test_the_manifest_is_sha256sums(shipped: Path) -> None:
    ended = subprocess.run(
        ["sha256sum", "--strict", "-c", "MANIFEST.sha256"], cwd=shipped, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout
    listed = {line.split("  ")[1] for line in (shipped / "MANIFEST.sha256").read_text().splitlines()}
    present = {p.relative_to(shipped).as_posix() for p in shipped.rglob("*") if p.is_file()}
    assert listed == present - {"MANIFEST.sha256"}


@pytest.mark.parametrize(
    "name",
    ["model.onnx", "artefact.json", "example.npz", "parity.json", "README.md", "triton/digits/config.pbtxt"],
)
def test_one_changed_byte_is_refused(artefact: Path, name: str) -> None:
    content = bytearray((artefact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artefact / name).unlink()
    (artefact / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=f"{name} in .* is not the file that was exported"):
        load(artefact)


def test_a_missing_file_is_refused(artefact: Path) -> None:
    (artefact / "example.npz").unlink()
    with pytest.raises(ArtefactError, match=r"example\.npz is missing"):
        load(artefact)


def test_two_files_that_changed_places_are_refused(artefact: Path) -> None:
    (artefact / "parity.json").rename(artefact / "x")
    (artefact / "benchmark.json").rename(artefact / "parity.json")
    (artefact / "x").rename(artefact / "benchmark.json")
    with pytest.raises(ArtefactError, match="is not the file that was exported"):
        load(artefact)


def test_a_swapped_model_with_a_mended_manifest_is_refused(artefact: Path) -> None:
    """The description holds the digests too."""
    old = sha256(artefact / "model.onnx")
    (artefact / "model.onnx").unlink()
    (artefact / "model.onnx").write_bytes((artefact / "triton/digits/1/model.onnx").read_bytes() + b"\x00")
    manifest = artefact / "MANIFEST.sha256"
    lines = [line for line in manifest.read_text().splitlines() if not line.endswith("  model.onnx")]
    manifest.write_text("\n".join([*lines, f"{sha256(artefact / 'model.onnx')}  model.onnx"]) + "\n")
    assert old not in lines
    with pytest.raises(ArtefactError, match="disagree: one of them was edited"):
        load(artefact)


def test_a_forgery_is_found_by_the_digest_kept_elsewhere(artefact: Path) -> None:
    digest = sha256(artefact / "MANIFEST.sha256")
    assert load(artefact, digest=digest).provider == "cpu"
    description = Artefact.model_validate_json((artefact / "artefact.json").read_text())
    seal(artefact, description.model_copy(update={"name": "forged"}))
    assert load(artefact).artefact.name == "forged"  # consistent in itself
    with pytest.raises(ArtefactError, match="its manifest differs"):
        load(artefact, digest=digest)


@pytest.mark.parametrize(
    "line, words",
    [("0" * 64 + "  ../outside\n", "names a file outside it"), ("no digest\n", "is damaged")],
)
def test_a_manifest_that_was_tampered_with(artefact: Path, line: str, words: str) -> None:
    manifest = artefact / "MANIFEST.sha256"
    manifest.write_text(manifest.read_text() + line)
    with pytest.raises(ArtefactError, match=words):
        load(artefact)


def test_a_manifest_that_leaves_out_the_description(artefact: Path) -> None:
    manifest = artefact / "MANIFEST.sha256"
    kept = [line for line in manifest.read_text().splitlines() if "artefact.json" not in line]
    manifest.write_text("\n".join(kept) + "\n")
    with pytest.raises(ArtefactError, match=r"does not cover artefact\.json"):
        load(artefact)


def test_a_folder_that_is_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is not an artefact"):
        load(tmp_path)


def test_a_later_schema_is_refused(artefact: Path) -> None:
    path = artefact / "artefact.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    manifest = artefact / "MANIFEST.sha256"
    lines = [line for line in manifest.read_text().splitlines() if "artefact.json" not in line]
    manifest.write_text("\n".join([*lines, f"{sha256(path)}  artefact.json"]) + "\n")
    with pytest.raises(ArtefactError, match="cannot be read"):
        load(artefact)


IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "length"))
MASK = TensorSpec(name="mask", dtype="int64", shape=("batch", "length"))
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, "any"))
AXES = {"batch": Axis(max=4), "length": Axis(min=8, max=32, multiple_of=8)}


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"ids": np.ones((2, 8), int)}, "input 'mask' is missing"),
        ({"ids": np.ones((2, 8), int), "mask": np.ones((2, 8), int), "x": 1}, "there is no input 'x'"),
        (
            {"ids": np.ones((2, 8), int), "mask": np.ones((2, 8))},
            r"got float64\[2, 8\]: convert it with .astype\('int64'\)",
        ),
        ({"ids": np.ones((2, 8), int), "mask": np.ones(8, int)}, "1 axes instead of 2"),
        ({"ids": np.ones((5, 8), int), "mask": np.ones((5, 8), int)}, "batch is 5, allowed is 1 to 4"),
        (
            {"ids": np.ones((2, 9), int), "mask": np.ones((2, 9), int)},
            "length is 9, allowed is 8 to 32, a multiple of 8",
        ),
        (
            {"ids": np.ones((2, 8), int), "mask": np.ones((2, 16), int)},
            "length is 16 here and 8 in input 'ids'",
        ),
    ],
)
def test_inputs_that_do_not_fit(arrays: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_arrays((IDS, MASK), AXES, arrays)


def test_a_named_axis_without_a_range_takes_any_size() -> None:
    check_arrays((IMAGE,), AXES, {"image": np.ones((2, 3, 77), np.float32)})
    with pytest.raises(InputError, match="axis 1 has 4 elements instead of 3"):
        check_arrays((IMAGE,), AXES, {"image": np.ones((2, 4, 77), np.float32)})


@pytest.mark.parametrize(
    ("shape", "count"), [(("batch", 3), 3), (("batch", 7, 3), 3), (("batch", 3, 8, 8), 3)]
)
def test_labels_count_the_class_axis(shape: tuple[int | str, ...], count: int) -> None:
    """The last one, and of maps [B, C, H, W] the second."""
    from types import SimpleNamespace
    from typing import cast

    from kd_exporter_onnx.describe import _check_labels
    from kd_exporter_onnx.spec import ExportSpec

    output = TensorSpec(name="y", dtype="float32", shape=shape)
    named = [cast(ExportSpec, SimpleNamespace(labels=("a",) * n, host=None)) for n in (count, count + 1)]
    _check_labels(named[0], output)
    with pytest.raises(SpecError, match="4 labels for the 3 values"):
        _check_labels(named[1], output)
