"""Build every distribution (sdist, then the wheel from that sdist) and try them where nothing else is.

Three environments, each installed from the built files alone: the core with its plugins, in which the demo's
recipe runs shortened from outside the clone; one without torch and kdcore, in which the artefact's example gives
the artefact's answers and ``kd-verify`` passes; and one without a runtime, where the error says what to install.

    python tools/check_wheels.py [--python python3.11] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from dev_install import ROOT, packages


def build(folder: Path, scratch: Path, into: Path) -> Path:
    """The wheel of one package, built from its own sdist as an index would."""
    table = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["build-system"]
    backend = importlib.import_module(table["build-backend"])
    sdist = _in(folder, lambda: scratch / str(backend.build_sdist(str(scratch))))
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    unpacked = scratch / sdist.name.removesuffix(".tar.gz")
    return _in(unpacked, lambda: into / str(backend.build_wheel(str(into))))


def _in(folder: Path, call: Callable[[], Path]) -> Path:
    here = Path.cwd()
    try:
        os.chdir(folder)
        return call()
    finally:
        os.chdir(here)


def environment(folder: Path, python: str, wheels: Path, *names: str) -> Path:
    """A new environment with the named distributions, ours from ``wheels`` only."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    binary = folder / "bin" / "python"
    command = [binary, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["-c", ROOT / "constraints.txt", "--find-links", wheels]
    subprocess.run([str(part) for part in [*command, *constraints, *names]], check=True)
    return binary


def check_core(python: str, wheels: Path, scratch: Path, names: list[str]) -> None:
    wanted = [f"{name}[export]" if name.startswith("kd-exporter") else name for name in names]
    binary = environment(scratch / "core", python, wheels, *wanted, "scikit-learn", "onnxruntime")
    kd = binary.parent / "kd"
    for command in (["list"], ["plugins"], ["doctor"]):
        subprocess.run([str(kd), *command], check=True, cwd=scratch)
    road = subprocess.run([str(kd), "list", "--all"], check=True, cwd=scratch, capture_output=True, text=True)
    if "catalogued, not installed" not in road.stdout:
        raise SystemExit("the wheel carries no catalogue")
    run = [
        str(kd),
        "run",
        "pld:digits",
        "train.epochs=2",
        "teacher.main.train.epochs=2",
        "--out",
        "demo",
        "--quiet",
    ]
    subprocess.run(run, check=True, cwd=scratch, stdout=subprocess.DEVNULL)
    subprocess.run([str(kd), "export", "demo", "--out", "artefact"], check=True, cwd=scratch)


SERVE = """
import importlib.util as u, numpy as np, kd_exporter_onnx as k
assert not u.find_spec("torch") and not u.find_spec("kdcore")
e = np.load("artefact/example.npz")
sides = {s: {n.split("/", 1)[1]: e[n] for n in e.files if n.startswith(s)} for s in ("input", "output")}
said = k.load("artefact").run_graph(sides["input"])
for name, expected in sides["output"].items():
    np.testing.assert_allclose(said[name], expected, rtol=1e-3, atol=1e-3)
print("served without torch:", sorted(said))
"""
BARE = """
import kd_exporter_onnx as k
try:
    k.load("artefact")
except k.NoRuntimeError as error:
    assert "[cpu]" in str(error) and "[gpu]" in str(error), error
else:
    raise SystemExit("an artefact loaded without any runtime")
"""


def check_serving(python: str, wheels: Path, scratch: Path) -> None:
    """With the CPU runtime, the shipped example gives the shipped answers; without one, the error says what to install."""
    binary = environment(scratch / "serving", python, wheels, "kd-exporter-onnx[cpu]")
    subprocess.run([str(binary), "-c", SERVE], check=True, cwd=scratch)
    verify = [str(binary.parent / "kd-verify"), "artefact", "--provider", "cpu"]
    subprocess.run(verify, check=True, cwd=scratch)
    bare = environment(scratch / "bare", python, wheels, "kd-exporter-onnx")
    subprocess.run([str(bare), "-c", BARE], check=True, cwd=scratch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        wheels = scratch / "wheels"
        wheels.mkdir()
        names = []
        for folder in packages():
            wheel = build(folder, scratch, wheels)
            names.append("-".join(wheel.name.split("-")[0].split("_")))
            print(f"built {wheel.name}", flush=True)
        check_core(options.python, wheels, scratch, names)
        if "kd-exporter-onnx" in names:
            check_serving(options.python, wheels, scratch)
    print(f"{len(names)} passed, 0 failed")


if __name__ == "__main__":
    main()
