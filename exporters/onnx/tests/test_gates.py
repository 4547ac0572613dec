"""Each gate on a model that it must refuse."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from kd_exporter_onnx import ExportSpec, Refused, export, gates
from kd_exporter_onnx.parity import gate_provider
from torch import nn

Spec = Callable[..., ExportSpec]


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., Refused]:
    """Export, expect a refusal by the named gate, and nothing left anywhere."""

    def check(gate: str, module: nn.Module, spec: ExportSpec, **parameters: Any) -> Refused:
        with pytest.raises(Refused) as caught:
            export(module, spec, tmp_path / "out" / "artefact", benchmark="none", **parameters)
        assert caught.value.gate == gate, str(caught.value)
        assert list((tmp_path / "out").iterdir()) == []
        return caught.value

    return check


def test_eval_refuses_dropout_left_on(refuse: Any, flat_spec: Spec) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3)).eval()
    module[1].train()
    error = refuse("eval", module, flat_spec())
    assert "in training mode: 1;" in str(error)


def test_pure_refuses_dropout_written_into_the_forward(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module = students.Function(lambda y: torch.nn.functional.dropout(y, 0.5, training=True)).eval()
    error = refuse("pure", module, flat_spec())
    assert (error.output, error.allowed) == ("y", 1e-6)
    assert error.distance > 0.1


def test_pure_refuses_a_forward_that_counts(refuse: Any, flat_spec: Spec) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 3)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    assert "changes 'calls'" in str(refuse("pure", Counting().eval(), flat_spec()))


def test_pure_refuses_bfloat16_outputs(refuse: Any, flat_spec: Spec, students: SimpleNamespace) -> None:
    module = students.Function(lambda y: y.bfloat16()).eval()
    assert "return float32" in str(refuse("pure", module, flat_spec()))


def test_capture_refuses_a_branch_on_values_in_words(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    error = refuse("capture", students.Branch().eval(), flat_spec())
    assert "a branch that depends on the values in a tensor (`if x.sum() > 0:` at conftest.py:" in str(error)
    assert "torch.where" in str(error)


def test_capture_names_an_operator_without_onnx_form(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module = students.Function(lambda y: torch.cdist(y, torch.eye(3))).eval()
    assert "aten._cdist_forward has no ONNX form" in str(refuse("capture", module, flat_spec()))


def test_capture_names_an_axis_that_the_student_fixes(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module = students.Function(lambda y: y.reshape(2, 3)).eval()
    samples = {"x": np.ones((2, 8), np.float32)}
    error = refuse("capture", module, flat_spec(samples=samples))
    assert "declared dynamic, but the student fixes it at 2" in str(error)


def test_parity_refuses_a_branch_on_the_batch_size(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module = students.Function(lambda y: y if y.shape[0] < 8 else -y).eval()
    error = refuse("parity", module, flat_spec())
    assert error.point["batch"] >= 8
    assert error.distance == pytest.approx(2, rel=1e-3)
    assert error.sample is not None


def test_parity_refuses_adaptive_pooling_of_any_size(refuse: Any, students: SimpleNamespace) -> None:
    images = np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype(np.float32)
    side = {"min": 32, "max": 64, "multiple_of": 16}
    spec = ExportSpec(
        inputs=[{"name": "x", "dtype": "float32", "shape": ("batch", 3, "h", "w")}],
        outputs=("y",),
        axes={"batch": {"max": 4}, "h": side, "w": side},
        samples={"x": images},
    )
    error = refuse("parity", students.Adaptive().eval(), spec)
    assert (error.point["h"], error.point["w"]) != (32, 32)  # right where it was traced, and only there
    assert error.distance > 0.1
    assert error.sample in range(6)


def test_the_same_error_in_tiny_outputs_is_refused_too(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module = students.Function(lambda y: 1e-6 * (y if y.shape[0] < 8 else 1.01 * y)).eval()
    assert refuse("parity", module, flat_spec()).distance == pytest.approx(0.01, rel=0.1)


def test_loads_refuses_what_the_runtime_has_no_kernel_for(refuse: Any, flat_spec: Spec) -> None:
    class Bf16(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.bfloat16()).float()

    assert "cannot load it on cpu" in str(refuse("loads", Bf16(8, 3).bfloat16().eval(), flat_spec()))


def test_axes_refuses_an_input_that_the_student_does_not_take(
    refuse: Any, tmp_path: Path, flat_spec: Spec
) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20]>g (float[batch, 9] x) => (float[batch, 9] y) { y = Relu(x) }'
    )
    with pytest.raises(Refused, match=r"float32\[batch, 9\], declared is float32\[batch, 8\]"):
        gates.gate_axes(model, flat_spec())


@pytest.mark.parametrize(
    "node, gate, words",
    [
        ("y = RandomNormalLike(x)", lambda m: gates.gate_random(m), "RandomNormalLike"),
        ("t = Constant<value = bool {1}>() r = Constant<value = float {0.5}>() y = Dropout(x, r, t)",
         lambda m: gates.gate_random(m), "Dropout"),
        ("y = com.microsoft.Gelu(x)", lambda m: gates.gate_domains(m, ()), "com.microsoft::Gelu"),
    ],
)  # fmt: skip
def test_graph_gates_refuse(node: str, gate: Callable[[onnx.ModelProto], Any], words: str) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20, "com.microsoft" : 1]>'
        f"g (float[batch, 8] x) => (float[batch, 8] y) {{ {node} }}"
    )
    with pytest.raises(Refused, match=words):
        gate(model)


def test_a_random_operator_inside_a_branch_is_found() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20]> g (bool c, float[2] x) => (float[2] y) {'
        "y = If (c) <then_branch = a () => (float[2] p) { p = RandomUniformLike(x) },"
        "else_branch = b () => (float[2] q) { q = Identity(x) }> }"
    )
    with pytest.raises(Refused, match="RandomUniformLike"):
        gates.gate_random(model)


def test_domains_allows_by_name() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20, "com.microsoft" : 1]>'
        "g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }"
    )
    assert gates.gate_domains(model, ("com.microsoft::Gelu",)) == {
        "custom_operators": ["com.microsoft::Gelu"]
    }


def test_checker_refuses_an_invalid_file(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu(z) }'
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(Refused, match="checker"):
        gates.gate_checker(tmp_path / "model.onnx")


def test_absent_refuses_an_auxiliary_head_in_the_graph(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module = students.TwoHeads().eval()
    module.forward = lambda x: module.aux_head(module.body(x).relu())
    error = refuse("absent", module, flat_spec(absent=("aux_head",)))
    assert "aux_head" in str(error)


def test_absent_refuses_weights_by_value(refuse: Any, flat_spec: Spec, students: SimpleNamespace) -> None:
    module = students.Function(torch.relu).eval()
    weight = module.f.weight.detach().numpy().copy()
    refuse("absent", module, flat_spec(absent_weights={"projector.weight": weight}))
    refuse("absent", module, flat_spec(absent_weights={"projector.weight": weight.T}))


def test_rule_refuses_one_head_instead_of_the_mixture(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module, spec = students.TwoHeads().eval(), flat_spec()
    with torch.no_grad():
        mixed = module(torch.from_numpy(spec.samples["x"])).numpy()
    alone = students.TwoHeads(mix=0.0).eval()
    alone.load_state_dict(module.state_dict())
    error = refuse("rule", alone, flat_spec(rule={"y": mixed}))
    assert error.distance > 0.01
    assert "inference rule" in str(error)


def test_rule_refuses_samples_that_cannot_tell(
    refuse: Any, flat_spec: Spec, students: SimpleNamespace
) -> None:
    module, spec = students.TwoHeads(mix=0.0).eval(), flat_spec()
    with torch.no_grad():
        outputs = module(torch.from_numpy(spec.samples["x"])).numpy()
    spec = flat_spec(rule={"y": outputs}, rule_alternatives={"first head": {"y": outputs}})
    assert "nothing is proved" in str(refuse("rule", module, spec))


def test_metric_refuses_wrong_preprocessing(refuse: Any, trained: nn.Module, digits_spec: Spec) -> None:
    wrong = [{"step": "add_axis", "axis": 1}, {"step": "scale", "factor": 1 / 255}]
    error = refuse("metric", trained, digits_spec(preprocessing=wrong))
    assert "in torch" in str(error)
    assert error.distance > 0.3


def test_preprocessing_is_judged_on_outputs_without_a_metric(
    refuse: Any, trained: nn.Module, digits_spec: Spec
) -> None:
    wrong = [{"step": "add_axis", "axis": 1}, {"step": "scale", "factor": 1 / 255}]
    error = refuse("preprocessing", trained, digits_spec(preprocessing=wrong, metric=None))
    assert error.output == "logits"


def test_metric_holds_against_what_training_measured(
    refuse: Any, trained: nn.Module, digits_spec: Spec
) -> None:
    error = refuse("metric", trained, digits_spec(reference_metric=1.1))
    assert error.allowed == 0.01


def test_files_refuses_local_paths_and_links(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\0" * 100 + b"/home/someone/student.py" + b"\0")
    with pytest.raises(Refused, match=r"model.onnx contains a local path \(source\)"):
        gates.gate_files(tmp_path, {"source": "/home/someone/"})
    assert gates.gate_files(tmp_path, {"source": "/home/other/"}) == {"searched_for": ["source"]}
    (tmp_path / "link").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(Refused, match="link is a link"):
        gates.gate_files(tmp_path, {})


def test_a_path_across_two_blocks_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 14 + b"secret" + b"b" * 20)
    assert gates.contains(tmp_path / "file", b"secret", block=16)
    assert not gates.contains(tmp_path / "file", b"secrets", block=16)


def test_provider_refuses_heavy_work_on_the_cpu() -> None:
    nodes = {"CUDAExecutionProvider": {"Relu": 3}, "CPUExecutionProvider": {"Conv": 2, "Shape": 1}}
    with pytest.raises(
        Refused, match=r"cuda was asked for, but these operators ran on the CPU: \{'Conv': 2\}"
    ):
        gate_provider(nodes, "cuda")
    gate_provider({"CUDAExecutionProvider": {"Conv": 2}, "CPUExecutionProvider": {"Shape": 1}}, "cuda")
    gate_provider({"CPUExecutionProvider": {"Conv": 2}}, "cpu")
