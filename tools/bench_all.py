"""Run the benchmarks and write docs/benchmarks.md: every figure with the command that makes it.

python tools/bench_all.py [--skip tokens] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "import": ["tools/bench_import.py"],
    "step": ["tools/bench_step.py"],
    "tokens": ["tools/bench_tokens.py", "--rounds", "3", "--threads", "2"],
}
TITLES = {
    "import": "Start-up",
    "step": "The step's overhead",
    "tokens": "Token divergences from hidden states",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of numbers and words as markdown, keys as columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_cell, value)) if isinstance(value, list) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip", nargs="*", default=[])
    options = parser.parse_args()
    processor = platform.processor() or platform.machine()
    page = [
        "<!-- written by tools/bench_all.py -->",
        "# Benchmarks\n",
        f"{datetime.date.today()}, {os.cpu_count()} cores ({processor}), torch {torch.__version__}, "
        f"load average {os.getloadavg()[0]:.1f} at the start. Ratios are within one run; absolute times are this "
        "machine's.\n",
    ]
    for name, command in COMMANDS.items():
        if name in options.skip:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "rows.json"
            done = subprocess.run(
                [sys.executable, *command, "--json", str(out)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            rows = json.loads(out.read_text("utf-8"))
        page += [f"## {TITLES[name]}\n", f"`python {' '.join(command)}`\n"]
        page.append(table(rows) if isinstance(rows, list) else f"```\n{done.stdout.strip()}\n```")
        page.append("")
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(page) + "\n", "utf-8")


if __name__ == "__main__":
    main()
