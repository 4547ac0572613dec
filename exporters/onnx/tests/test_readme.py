"""The example in the README, run as it stands."""

from pathlib import Path

import kd_exporter_onnx
import pytest


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = Path(kd_exporter_onnx.__file__).parents[1] / "README.md"
    code = readme.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert printed.startswith("export refused at gate 'eval'")
    assert printed.count("verified on cpu") == 2
    assert not (tmp_path / "refused").exists()
