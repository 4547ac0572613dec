"""Students of several kinds from module to artefact, and what an export leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from kd_exporter_onnx import ExportSpec, OnnxExporter, Refused, SpecError, capture, export, load
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

Spec = Callable[..., ExportSpec]


def test_cnn_with_batch_norm_from_raw_bytes(
    shipped: Path, trained: nn.Module, digits: SimpleNamespace
) -> None:
    session = load(shipped)
    served = session(digits.raw[:64])["logits"]
    with torch.no_grad():
        student = trained(torch.from_numpy(digits.x[:64])).numpy()
    np.testing.assert_allclose(served, student, atol=1e-4 * np.abs(student).max())
    assert session.provider == "cpu"


def test_the_folder_holds_everything_and_no_local_path(shipped: Path) -> None:
    files = {path.relative_to(shipped).as_posix() for path in shipped.rglob("*") if path.is_file()}
    assert files == {
        "MANIFEST.sha256", "README.md", "artefact.json", "benchmark.json", "example.npz", "model.onnx",
        "parity.json", "triton/digits/1/model.onnx", "triton/digits/config.pbtxt",
    }  # fmt: skip
    model = onnx.load(shipped / "model.onnx")
    assert not [p for node in model.graph.node for p in node.metadata_props]
    assert all(
        node.op_type != "BatchNormalization" for node in model.graph.node
    )  # folded into the convolutions
    assert b"conftest.py" not in (shipped / "model.onnx").read_bytes()


def test_parity_json_has_the_numbers(shipped: Path) -> None:
    parity = json.loads((shipped / "parity.json").read_text())
    assert {one["point"]["batch"] for one in parity["compared"]} >= {1, 2, 17, 33, 64}
    assert max(one["difference"] for one in parity["compared"]) < 1e-5
    assert parity["metric"]["reference"] == parity["metric"]["served"] > 0.9
    assert parity["samples"] == 300
    assert max(parity["gates"]["preprocessing"]["inputs"].values()) < 1e-6


def test_the_receivers_readme_runs(
    shipped: Path, digits: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (shipped / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(shipped.parent)
    scope: dict[str, Any] = {"image": digits.raw[:5]}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["outputs"]["logits"].shape == (5, 10)


def test_vit_from_transformers(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
        patch_size=8, num_labels=5,
    )  # fmt: skip
    images = np.random.default_rng(0).normal(size=(10, 3, 32, 32)).astype(np.float32)
    spec = ExportSpec(
        inputs=[{"name": "pixel_values", "dtype": "float32", "shape": ("batch", 3, 32, 32)}],
        outputs=("logits",),
        axes={"batch": {"max": 8}},
        samples={"pixel_values": images},
    )
    report = export(ViTForImageClassification(config).eval(), spec, tmp_path / "vit", benchmark="none")
    assert report.parity.worst().difference < 1e-5
    assert load(tmp_path / "vit")(images[:3])["logits"].shape == (3, 5)


def causal_lm(layers: int = 2) -> nn.Module:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def lm_spec(side: str, **changes: Any) -> ExportSpec:
    """Token sequences of 3 to 9, padded on one side."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 50, size=length) for length in (9, 3, 5, 8, 4, 6)]
    ids, mask = np.zeros((6, 9), np.int64), np.zeros((6, 9), np.int64)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
        ids[i, where], mask[i, where] = row, 1
    plain = {
        "name": "lm",
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "shape": ("batch", "length")},
            {"name": "attention_mask", "dtype": "int64", "shape": ("batch", "length")},
        ],
        "outputs": ("logits",),
        "axes": {"batch": {"max": 4}, "length": {"max": 24}},
        "samples": {"input_ids": ids, "attention_mask": mask},
        "raw_samples": {"input_ids": rows},
        "preprocessing": [{"step": "pad_ids", "value": 0, "side": side, "mask": "attention_mask"}],
    }
    return ExportSpec(**(plain | changes))


def test_causal_language_model_with_dynamic_length(tmp_path: Path) -> None:
    module, out = causal_lm(), tmp_path / "lm"
    spec = lm_spec("right", metric=lambda outputs, _: -_nll(outputs), metric_name="log-likelihood")
    report = export(module, spec, out, benchmark="none")
    assert {(p.point["batch"], p.point["length"]) for p in report.parity.compared} >= {
        (1, 1),
        (4, 24),
        (1, 24),
    }
    session = load(out)
    ids = [np.array([7, 8, 9, 10]), np.array([5])]
    logits = session({"input_ids": ids})["logits"]
    with torch.no_grad():
        alone = module(torch.tensor([[5]])).logits.numpy()
    np.testing.assert_allclose(logits[1, 0], alone[0, 0], atol=1e-5)
    assert logits.shape == (2, 4, 50)


def _nll(outputs: dict[str, Any]) -> float:
    """Of token 1 at every first position: the same whatever the padding."""
    first = np.stack([row[0] for row in outputs["logits"]]).astype(np.float64)
    return float(-(first[:, 1] - np.log(np.exp(first).sum(-1))).mean())


def test_fully_masked_positions_are_named_and_can_be_left_out(tmp_path: Path) -> None:
    module = causal_lm(layers=1)
    with pytest.raises(Refused, match="only where 'attention_mask' is 0") as caught:
        export(module, lm_spec("left", raw_samples=None, preprocessing=[]), tmp_path / "lm", benchmark="none")
    assert caught.value.gate == "parity"
    where = {"logits": "attention_mask"}
    spec = lm_spec("left", raw_samples=None, preprocessing=[], compare_where=where)
    inputs = {name: torch.from_numpy(value) for name, value in spec.samples.items()}
    with torch.no_grad():
        rule = {"logits": module(**inputs).logits.numpy()}
    spec = lm_spec("left", raw_samples=None, preprocessing=[], compare_where=where, rule=rule)
    report = export(module, spec, tmp_path / "lm", benchmark="none")
    assert report.parity.worst().difference < 1e-5
    assert report.artefact.compare_where == where


def test_two_heads_with_their_rule(tmp_path: Path, flat_spec: Spec, students: SimpleNamespace) -> None:
    module = students.TwoHeads().eval()
    x = torch.from_numpy(flat_spec().samples["x"])
    with torch.no_grad():
        a, b = (head.softmax(-1).numpy() for head in module.heads(x))
    spec = flat_spec(
        absent=("aux_head",),
        rule={"y": 0.7 * a + 0.3 * b},
        rule_alternatives={"head a alone": {"y": a}, "head b alone": {"y": b}},
    )
    report = export(module, spec, tmp_path / "two", benchmark="none")
    assert report.parity.gates["rule"]["told_apart_from"] == ["head a alone", "head b alone"]
    assert report.parity.gates["absent"]["compared_by_value"] == 2
    names = [tensor.name for tensor in onnx.load(tmp_path / "two" / "model.onnx").graph.initializer]
    assert not [name for name in names if "aux" in name]


def test_work_around_the_graph_ships_as_python(
    tmp_path: Path, flat_spec: Spec, students: SimpleNamespace
) -> None:
    host = tmp_path / "around.py"
    host.write_text(
        "import numpy as np\n"
        "def preprocess(inputs):\n    return {'x': inputs['points'][:, ::2].astype(np.float32)}\n"
        "def postprocess(outputs):\n    return {'boxes': [row[row > 0] for row in outputs['y']]}\n"
    )
    spec = flat_spec()
    points = np.repeat(spec.samples["x"].astype(np.float64), 2, axis=1)
    module = students.Function(torch.tanh).eval()
    metric = lambda outputs, _: float(sum(len(boxes) for boxes in outputs["boxes"]))  # noqa: E731
    spec = flat_spec(host=host, raw_samples={"points": points}, metric=metric)
    export(module, spec, tmp_path / "out", benchmark="none")
    with pytest.raises(RuntimeError, match=r"read .*host.py, then load\(..., host_code=True\)"):
        load(tmp_path / "out")
    boxes = load(tmp_path / "out", host_code=True)({"points": points[:2]})["boxes"]
    with torch.no_grad():
        expected = module(torch.from_numpy(spec.samples["x"][:2])).numpy()
    np.testing.assert_allclose(boxes[1], expected[1][expected[1] > 0], atol=1e-6)


def test_large_models_keep_their_weights_in_a_second_file(
    tmp_path: Path, flat_spec: Spec, students: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "ONE_FILE_LIMIT", 100)
    module = students.Function(torch.tanh, outputs=64).eval()
    export(module, flat_spec(), tmp_path / "big", benchmark="none")
    data = tmp_path / "big" / "model.onnx.data"
    assert (tmp_path / "big/triton/student/1/model.onnx.data").stat().st_size == data.stat().st_size
    assert load(tmp_path / "big")(flat_spec().samples["x"][:2])["y"].shape == (2, 64)
    flipped = bytearray(data.read_bytes())
    flipped[10] ^= 1  # onnxruntime would load it and answer wrongly
    data.write_bytes(flipped)
    with pytest.raises(RuntimeError, match=r"model\.onnx\.data .* is not the file that was exported"):
        load(tmp_path / "big")


def test_the_same_student_gives_the_same_file(
    tmp_path: Path, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module, spec = students.Function(torch.relu).eval(), flat_spec()
    feeds = {"x": torch.from_numpy(spec.samples["x"][:2])}
    files = [capture.capture(module, spec, feeds, 20, tmp_path / name).path for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_refusal_leaves_what_was_there(tmp_path: Path, flat_spec: Spec, students: SimpleNamespace) -> None:
    out, good = tmp_path / "out", students.Function(torch.relu).eval()
    export(good, flat_spec(), out, benchmark="none")
    before = (out / "MANIFEST.sha256").read_text()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export(good, flat_spec(), out, benchmark="none")
    with pytest.raises(Refused):
        export(good.train(), flat_spec(), out, benchmark="none", overwrite=True)
    assert (out / "MANIFEST.sha256").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export(students.Function(torch.tanh).eval(), flat_spec(), out, benchmark="none", overwrite=True)
    assert (out / "MANIFEST.sha256").read_text() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_absent_provider_ships_as_verified_on_the_cpu_only(
    tmp_path: Path, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module = students.Function(torch.relu).eval()
    report = export(module, flat_spec(), tmp_path / "out", benchmark="none", provider="cuda")
    assert report.artefact.target == "cuda"
    assert report.artefact.verified == ("cpu",)
    assert "cuda" in report.parity.not_verified
    assert "Not verified on cuda" in (tmp_path / "out/README.md").read_text()


def test_a_batch_of_one_is_fixed_and_a_length_of_one_is_not(tmp_path: Path) -> None:
    class Sums(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    spec = ExportSpec(
        inputs=[{"name": "x", "dtype": "float32", "shape": ("batch", "length")}],
        outputs=("y",),
        axes={"batch": {"max": 1}, "length": {"max": 6}},
        samples={"x": np.arange(3, dtype=np.float32)[:, None]},  # of length 1
    )
    export(Sums().eval(), spec, tmp_path / "out", benchmark="none")
    session = load(tmp_path / "out")
    assert session(np.ones((1, 5), np.float32))["y"].tolist() == [[1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="batch is 2, allowed is 1 to 1"):
        session(np.ones((2, 5), np.float32))


def test_a_fixed_batch(tmp_path: Path, students: SimpleNamespace) -> None:
    spec = ExportSpec(
        inputs=[{"name": "x", "dtype": "float32", "shape": (4, 8)}],
        outputs=("y",),
        samples={"x": np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)},
        metric=lambda outputs, _: float(len(outputs["y"])),
    )
    report = export(students.Function(torch.relu).eval(), spec, tmp_path / "out", benchmark="none")
    assert report.parity.metric.served == 6
    assert "max_batch_size: 0" in (tmp_path / "out/triton/student/config.pbtxt").read_text()


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets(opset: int, tmp_path: Path, flat_spec: Spec, students: SimpleNamespace) -> None:
    module = students.Function(torch.nn.functional.gelu).eval()
    report = export(module, flat_spec(), tmp_path / "out", benchmark="none", opset=opset)
    assert report.artefact.opset == opset
    assert onnx.load(tmp_path / "out/model.onnx").opset_import[0].version == opset


class Pair(NamedTuple):
    best: torch.Tensor
    score: torch.Tensor


@pytest.mark.parametrize("form", ["tuple", "mapping", "named tuple", "object"])
def test_outputs_by_order_or_by_name(form: str) -> None:
    score, best = torch.zeros(1), torch.ones(1)
    returned = {
        "tuple": (score, best),
        "mapping": {"best": best, "score": score, "other": None},
        "named tuple": Pair(best, score),
        "object": SimpleNamespace(best=best, score=score),
    }
    assert [x.item() for x in capture.select(returned[form], ("score", "best"))] == [0, 1]


@pytest.mark.parametrize(
    "returned, words",
    [
        ({"best": torch.ones(1)}, r"a mapping of \['best'\]"),
        ((torch.ones(1),) * 3, "3 values"),
        (torch.ones(1), "one tensor"),
        (SimpleNamespace(best=1), "a SimpleNamespace"),
    ],
)
def test_outputs_that_are_not_there(returned: Any, words: str) -> None:
    with pytest.raises(SpecError, match=rf"forward returned {words}, which does not give the outputs"):
        capture.select(returned, ("score", "best"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"axes": {}}, r"axes in the shapes are \['batch'\]"),
        ({"samples": {"x": np.ones((4, 8))}}, r"got float64\[4, 8\]"),
        ({"samples": {"x": np.ones((4, 7), np.float32)}}, "axis 1 has 7 elements instead of 8"),
        ({"samples": {}}, "input 'x' is missing"),
        ({"preprocessing": [{"step": "scale", "factor": 1}]}, "give raw_samples"),
        ({"raw_samples": {"x": np.ones(3)}}, "must be the same 24 samples"),
        ({"rule": {"z": np.ones(3)}}, r"rule names \['z'\]"),
        ({"compare_where": {"y": "mask"}}, r"compare_where names \['mask'\]"),
        ({"rule_alternatives": {"a": {}}}, "need the rule's own outputs"),
        ({"colour": "red"}, "colour: Extra inputs"),
    ],
)
def test_a_specification_that_contradicts_itself(
    changes: dict[str, Any], words: str, flat_spec: Spec
) -> None:
    with pytest.raises(SpecError, match=words):
        flat_spec(**changes)


def test_host_code_that_is_no_python(tmp_path: Path, flat_spec: Spec) -> None:
    host = tmp_path / "host.py"
    host.write_text("def preprocess(inputs:\n", "utf-8")
    with pytest.raises(SpecError, match=r"host\.py is no Python"):
        flat_spec(host=host, raw_samples={"x": np.ones((24, 8), np.float32)})


def test_labels_must_fit_the_outputs(tmp_path: Path, flat_spec: Spec, students: SimpleNamespace) -> None:
    with pytest.raises(SpecError, match="2 labels for the 3 values of output 'y'"):
        export(
            students.Function(torch.relu).eval(),
            flat_spec(labels=("a", "b")),
            tmp_path / "o",
            benchmark="none",
        )


def test_int8_without_a_metric_is_an_error_before_anything_runs(tmp_path: Path, flat_spec: Spec) -> None:
    with pytest.raises(SpecError, match="int8 is judged by the task metric"):
        OnnxExporter(precision="int8").export(nn.Linear(8, 3).eval(), flat_spec(), tmp_path / "out")
