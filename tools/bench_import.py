"""Start-up: ``import kdcore`` and ``kd list`` beside 50 more installed plugins, each in a process of its own.

The 50 are real distributions (a module and its metadata) in a temporary folder on the path. Prints the
median and spread of whole-process wall seconds, above that of an empty Python process, in turns.

    python tools/bench_import.py [--runs 11] [--plugins 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLUGIN = """from kdcore import Component, hookimpl

@hookimpl
def kd_losses():
    yield Component("made{n}", "kd_plugin_made{n}.loss:loss", summary="made for the benchmark")
"""


def make_plugins(folder: Path, count: int) -> None:
    """Distributions as pip leaves them: module, METADATA, entry_points.txt."""
    for n in range(count):
        (folder / f"kd_plugin_made{n}.py").write_text(PLUGIN.replace("{n}", str(n)), "utf-8")
        info = folder / f"kd_plugin_made{n}-0.1.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: kd-plugin-made{n}\nVersion: 0.1\nRequires-Dist: kdcore\n"
        (info / "METADATA").write_text(metadata, "utf-8")
        (info / "entry_points.txt").write_text(f"[kdcore]\nmade{n} = kd_plugin_made{n}\n", "utf-8")


def seconds(command: list[str], path: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--plugins", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    python = sys.executable
    ways = {
        "python alone": [python, "-c", "pass"],
        "import kdcore": [python, "-c", "import kdcore"],
        f"kd list, {options.plugins} more plugins": [python, "-m", "kdcore", "list"],
        "import torch": [python, "-c", "import torch"],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as scratch:
        make_plugins(Path(scratch), options.plugins)
        for turn in range(options.runs + 1):
            for name, command in ways.items():
                taken = seconds(command, scratch)
                if turn:  # the first writes byte code
                    times[name].append(taken)
    base = statistics.median(times["python alone"])
    rows = []
    for name, values in times.items():
        middle = statistics.median(values)
        rows.append(
            {
                "what": name,
                "seconds": middle,
                "min": min(values),
                "max": max(values),
                "above_python": middle - base,
            }
        )
        print(
            f"{name:28} {middle:.3f} s [{min(values):.3f}, {max(values):.3f}]  {middle - base:+.3f} s above python alone"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
