"""A student with work around its graph: the core hands the Python over, and the exporter proves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdcore
from kdcore.cli import main
from kdcore.errors import InputError, KDError
from kdcore.shipping import load_student, request_of

HOSTED = """
    from torch import nn
    from kdcore.models import ModuleStudent

    HOST = (
        "def preprocess(inputs):\\n    return {'halved': inputs['pixels'] / 32}\\n"
        "def postprocess(outputs):\\n    return {'logits': outputs['raw'][:, 1:] * SIGN}\\n"
    )

    class Core(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
        def forward(self, halved):
            return {"raw": widened(-self.module(2 * halved))}

    def widened(raw):  # a column that the data's labels know nothing of
        return nn.functional.pad(raw, (1, 0))

    class Hosted(ModuleStudent):
        sign = "-1"
        def inputs(self, batch):
            return {"halved": batch["input"] / 2}
        def graph(self, outputs):
            return {"raw": widened(-outputs.logits)}
        def host(self, batch):
            return HOST.replace("SIGN", self.sign), {"pixels": (batch["input"] * 16).numpy()}
        def deploy(self):
            return Core(self.module)

    class Wrong(Hosted):
        sign = "1"  # decodes to the least likely class
"""


@pytest.fixture
def hosted(install: Callable[..., Any], write_module: Callable[..., str], tiny: dict[str, Any]) -> Any:
    """A tiny recipe whose student divides before its graph and turns the sign back after it."""
    module = write_module(HOSTED)
    install(
        "hosted",
        f"""
        from kdcore import Component, hookimpl
        @hookimpl
        def kd_students():
            yield Component("hosted", "{module}:Hosted")
            yield Component("hosted.wrong", "{module}:Wrong")
    """,
    )

    def recipe(use: str) -> dict[str, Any]:
        tiny["student"]["use"] = use
        return tiny

    return recipe


def test_host_code_ships_and_is_inside_the_metrics_gate(
    hosted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kd_exporter_onnx import load

    kdcore.run(hosted("hosted"), out=tmp_path / "run")
    rows = kdcore.export(tmp_path / "run", params={"benchmark": "none", "provider": "tensorrt"})
    assert "accuracy on 256 samples of the validation split: " in rows["verdict"]
    assert "in torch" in (tmp_path / "run/artefact/README.md").read_text("utf-8")
    if "tensorrt" not in rows["verified on"]:  # what is not here is said
        told = f"run: kd-verify {tmp_path / 'run/artefact'} --provider tensorrt"
        assert told in capsys.readouterr().err
    session = load(rows["artefact"], host_code=True)
    request = request_of(tmp_path / "run")
    served = session({"pixels": request.raw_samples["pixels"][:5]})["logits"]  # type: ignore[index]
    student, run = load_student(tmp_path / "run")
    batch = next(iter(run.source.loader("val"))).rows(torch.arange(5))
    expected = student.infer(student(batch))["logits"].detach().numpy()
    np.testing.assert_allclose(served, expected, atol=1e-5)


def test_host_code_that_decodes_otherwise_than_the_student_is_refused(hosted: Any, tmp_path: Path) -> None:
    kdcore.run(hosted("hosted.wrong"), out=tmp_path / "run")
    with pytest.raises(KDError, match="as served"):
        kdcore.export(tmp_path / "run", params={"benchmark": "none"})
    assert not (tmp_path / "run" / "artefact").exists()


def test_the_recipes_own_exporter_is_taken(
    install: Callable[..., Any], write_module: Callable[..., str], tiny: dict[str, Any], tmp_path: Path
) -> None:
    module = write_module("""
        from kdcore import Exporter

        class Names(Exporter):
            def __init__(self, *, ending: str = ".txt"):
                self.ending = ending

            def export_request(self, request, out):
                out.with_suffix(self.ending).write_text(",".join(request.samples))
                return {"inputs": len(request.samples)}
    """)
    install(
        "names",
        f"""
        from kdcore import Component, hookimpl
        @hookimpl
        def kd_exporters():
            yield Component("names", "{module}:Names")
    """,
    )
    tiny["export"] = {"use": "names", "ending": ".csv"}
    assert kdcore.run(tiny, out=tmp_path / "run").results["export"]["inputs"] == 1
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--set", "ending=.md"])
    assert [(tmp_path / name).read_text() for name in ("run/artefact.csv", "again.md")] == ["input", "input"]


def test_objects_are_not_pickled_into_a_case(tmp_path: Path) -> None:
    from kd_exporter_onnx.replay import restore, save

    with pytest.raises(ValueError, match="holds Python objects"):
        save(tmp_path / "case.npz", {"x": [np.array([object()])]})
    save(tmp_path / "case.npz", {"x": np.arange(3), "y": [np.zeros(2), np.zeros(3)]})
    found = restore(tmp_path / "case.npz")
    assert found.keys() == {"x", "y"}  # and nothing that numpy took for an array
    assert [len(each) for each in found["y"]] == [2, 3]


def test_an_exporter_without_a_benchmark_says_so(tmp_path: Path) -> None:
    from kdcore import Exporter

    class Plain(Exporter):
        def export_request(self, request: Any, out: Path) -> dict[str, Any]:
            return {}

    with pytest.raises(InputError, match="Plain has no benchmark"):
        Plain().bench(tmp_path, None, None, batches=(1,), threads=1)
