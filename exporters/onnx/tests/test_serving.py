"""Loading and verifying, as on a serving machine."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kd_exporter_onnx import (
    ArtefactError,
    InputError,
    NoRuntimeError,
    export,
    load,
    providers,
    records,
    runtime,
    verify,
)
from kd_exporter_onnx.artefact import read
from kd_exporter_onnx.verification import main

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "kdcore", "onnx", "onnxscript", "transformers"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str, *arguments: str) -> str:
    """Run `code` in a process that has neither torch nor kdcore nor onnx."""
    command = [sys.executable, "-c", BLOCKED + code, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_load_and_run_without_torch_and_kdcore(
    shipped: Path, digits: SimpleNamespace, tmp_path: Path
) -> None:
    np.save(tmp_path / "raw.npy", digits.raw[:20])
    code = (
        "import numpy as np, kd_exporter_onnx as k\n"
        "out = k.load(sys.argv[1])(np.load(sys.argv[2]))['logits']\n"
        "print(*out.argmax(-1)); assert 'torch' not in sys.modules and 'kdcore' not in sys.modules"
    )
    answers = np.array(run_blocked(code, str(shipped), str(tmp_path / "raw.npy")).split(), int)
    assert (answers == digits.y[:20]).mean() > 0.8


def test_kd_verify_without_torch_and_kdcore(artefact: Path) -> None:
    out = run_blocked(
        "from kd_exporter_onnx.verification import main\nsys.exit(main(sys.argv[1:]))", str(artefact)
    )
    assert out.startswith("verified on cpu: largest difference")
    record = json.loads((artefact / "verified-cpu.json").read_text())
    assert set(record["placement"]) == {"CPUExecutionProvider"}
    assert load(artefact).provider == "cpu"  # the record is beside the manifest, not in it


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = run_blocked(
        "import kd_exporter_onnx\nprint(*{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert not {"numpy", "pydantic", "onnxruntime"} & set(loaded)


def test_every_public_name_exists() -> None:
    import kd_exporter_onnx

    assert all(getattr(kd_exporter_onnx, name) is not None for name in kd_exporter_onnx.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        kd_exporter_onnx.laod  # noqa: B018


@pytest.mark.parametrize("found, words", [
    (("onnxruntime", "onnxruntime-gpu"), r"pip uninstall -y onnxruntime onnxruntime-gpu.*\[cpu\].*\[gpu\]"),
])  # fmt: skip
def test_two_runtimes_are_refused_with_the_commands(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(providers, "installed", lambda: found)
    with pytest.raises(NoRuntimeError, match=words):
        load(shipped)


def test_no_runtime_names_both_commands(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NoRuntimeError, match=r'pip install "kd-exporter-onnx\[cpu\]".*GPU.*\[gpu\]"'):
        load(shipped)


def test_installed_distributions_are_found() -> None:
    assert providers.installed(("onnxruntime", "onnxruntime-gpu", "no-such-thing")) == ("onnxruntime",)


def test_torch_in_torch_out(shipped: Path, digits: SimpleNamespace) -> None:
    session = load(shipped, threads=1)
    numpy_out = session({"image": digits.raw[:4]})["logits"]
    torch_out = session({"image": torch.from_numpy(digits.raw[:4])})["logits"]
    assert isinstance(torch_out, torch.Tensor)
    np.testing.assert_array_equal(torch_out.numpy(), numpy_out)
    graph = session.run_graph({"image": torch.from_numpy(digits.x[:4])})["logits"]
    np.testing.assert_allclose(graph.numpy(), numpy_out, atol=1e-5)


def test_io_binding_gives_the_same(tmp_path: Path, flat_spec: Any) -> None:
    """The path of CUDA tensors, on the device that is here."""

    class Three(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = super().forward(x)
            return y, y.argmax(-1), y > 0

    outputs = ("score", "best", "positive")
    export(Three(8, 3).eval(), flat_spec(outputs=outputs), tmp_path / "out", benchmark="none")
    session = load(tmp_path / "out")
    feeds = {"x": torch.from_numpy(flat_spec().samples["x"][:10])[::2]}
    bound, plain = session._run_bound(torch, feeds, device="cpu"), session.run_graph(feeds)
    assert [bound[name].dtype for name in outputs] == [torch.float32, torch.int64, torch.bool]
    assert all(torch.equal(bound[name], plain[name]) for name in outputs)


@pytest.mark.parametrize(
    "given, words",
    [
        (np.ones((2, 8, 8)), r"input 'image' must be uint8\[batch, 8, 8\], got float64\[2, 8, 8\]"),
        (np.ones((2, 8, 9), np.uint8), "axis 2 has 9 elements instead of 8"),
        (np.ones((65, 8, 8), np.uint8), "batch is 65, allowed is 1 to 64"),
        ({"picture": np.ones((2, 8, 8), np.uint8)}, "input 'image' is missing"),
    ],
)
def test_wrong_inputs_are_named(shipped: Path, given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(shipped)(given)


def test_wrong_torch_inputs_are_named(shipped: Path) -> None:
    with pytest.raises(InputError, match=r"got bfloat16\[2, 1, 8, 8\]"):
        load(shipped).run_graph({"image": torch.ones(2, 1, 8, 8, dtype=torch.bfloat16)})


def test_the_session_says_where_it_runs(shipped: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kd_exporter_onnx.runtime"):
        session = load(shipped)
    assert "digits runs on cpu" in caplog.text
    assert repr(session) == "Session('digits' on cpu; image: uint8[batch, 8, 8])"


def test_cuda_is_refused_before_kd_verify(shipped: Path) -> None:
    with pytest.raises(ArtefactError, match=r"run `kd-verify .* --provider cuda` on this machine first"):
        load(shipped, provider="cuda")


def test_kd_verify_on_an_absent_provider_says_what_to_install(artefact: Path, capsys: Any) -> None:
    assert main([str(artefact), "--provider", "cuda"]) == 1
    assert "provider 'cuda' is not in this onnxruntime" in capsys.readouterr().err
    assert not (artefact / "verified-cuda.json").exists()


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, *, works: bool = True) -> None:
    """An onnxruntime that lists CUDA; its sessions claim it (`works`) or fall back, and run on the CPU."""
    real = providers.runtime()
    listed = SimpleNamespace(**{name: getattr(real, name) for name in ("SessionOptions", "__version__")})
    listed.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def session(*given: Any, **keywords: Any) -> Any:
        inner = real.InferenceSession(*given, **(keywords | {"providers": ["CPUExecutionProvider"]}))
        if works and keywords["providers"][0] != "CPUExecutionProvider":
            inner.get_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return inner

    listed.InferenceSession = session
    monkeypatch.setattr(providers, "runtime", lambda: listed)


def test_a_silent_fall_back_is_an_error(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, works=False)
    with pytest.raises(
        ArtefactError, match="asked for 'cuda', but onnxruntime fell back to CPUExecutionProvider"
    ):
        verify(artefact, "cuda")


def test_a_provider_that_opens_but_does_not_do_the_work(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cuda(monkeypatch)
    with pytest.raises(ArtefactError, match="cuda was asked for, but these operators ran on the CPU"):
        verify(artefact, "cuda")
    assert not (artefact / "verified-cuda.json").exists()


def test_a_record_lets_the_provider_load_until_something_changes(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cuda(monkeypatch)
    monkeypatch.setattr(providers, "misplaced", lambda *_: {})
    verify(artefact, "cuda")
    assert load(artefact, provider="cuda").provider == "cuda"
    assert load(artefact).provider == "cuda"  # the best that is verified
    with pytest.raises(ArtefactError, match=r"--provider cuda --tf32"):
        load(artefact, provider="cuda", tf32=True)
    with pytest.raises(ArtefactError, match="kd-verify"):
        load(artefact, provider="tensorrt")
    described = read(artefact)
    monkeypatch.setattr(providers, "machine", lambda: {"onnxruntime": "0.0", "architecture": "z80"})
    assert not records.verified(artefact, described, "cuda")


def test_a_damaged_record_counts_for_nothing(artefact: Path) -> None:
    (artefact / "verified-cuda.json").write_text("{}")
    assert not records.verified(artefact, read(artefact), "cuda")


def test_an_unverified_gpu_is_named_and_not_used(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_cuda(monkeypatch)
    with caplog.at_level(logging.WARNING, "kd_exporter_onnx.runtime"):
        assert load(artefact).provider == "cpu"
    assert "cuda is not used: first run `kd-verify" in caplog.text


def test_kd_verify_finds_other_numbers(artefact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    honest = runtime.Session.run_graph
    monkeypatch.setattr(
        runtime.Session,
        "run_graph",
        lambda self, feeds: {k: v * 1.01 for k, v in honest(self, feeds).items()},
    )
    assert main([str(artefact)]) == 1
    assert "output 'logits', row" in capsys.readouterr().err


def test_profiles_are_read_by_provider_and_operator() -> None:
    def event(name: str, **args: str) -> dict[str, Any]:
        return {"name": name, "args": args}

    events = [
        event("a_kernel_time", provider="CPUExecutionProvider", op_name="Conv"),
        event("b_kernel_time", provider="CPUExecutionProvider", op_name="Conv"),
        event("c_kernel_time", provider="CUDAExecutionProvider", op_name="Relu"),
        event("a_fence_before", provider="", op_name="Conv"),
        event("model_run"),
    ]
    assert providers.read_profile(events) == {
        "CPUExecutionProvider": {"Conv": 2},
        "CUDAExecutionProvider": {"Relu": 1},
    }
