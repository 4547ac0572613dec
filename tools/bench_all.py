"""Run the benchmarks and write docs/benchmarks.md: every figure with the command that makes it.

python tools/bench_all.py [--only step ...]     # the other sections stay as they are

Each section says when and on how busy a machine it was measured. Other frameworks are measured where they are
installed (tools/peers.py says how): a row that is missing means that one was not.
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
PAGE = ROOT / "docs" / "benchmarks.md"
HEAD = """<!-- written by tools/bench_all.py -->
# Benchmarks

Ratios are within one run; absolute times are those of the machine named in each section.
"""
COMMANDS = {
    "import": ["tools/bench_import.py"],
    "step": ["tools/bench_step.py", "--peers"],
    "tokens": ["tools/bench_tokens.py", "--rounds", "3", "--threads", "2"],
    "cache": ["tools/bench_cache.py", "step", "--rounds", "7"],
}
TITLES = {
    "import": "Start-up",
    "step": "The step's overhead",
    "tokens": "Token divergences from hidden states",
    "cache": "The teacher-signal cache",
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


def section(name: str) -> str:
    """One benchmark, run now."""
    processor, busy = platform.processor() or platform.machine(), os.getloadavg()[0]
    where = f"{datetime.date.today()}, {os.cpu_count()} cores ({processor}), torch {torch.__version__}"
    where += f", load average {busy:.1f}"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        command = [sys.executable, *COMMANDS[name], "--json", str(out)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rows = json.loads(out.read_text("utf-8"))
    told = table(rows) if isinstance(rows, list) else f"```\n{done.stdout.strip()}\n```"
    return f"## {TITLES[name]}\n\n`python {' '.join(COMMANDS[name])}`: {where}.\n\n{told}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    options = parser.parse_args()
    kept = PAGE.read_text("utf-8").split("\n## ")[1:] if PAGE.exists() else []
    sections = {text.partition("\n")[0]: f"## {text.rstrip()}\n" for text in kept}
    for name in options.only:
        sections[TITLES[name]] = section(name)
        text = [HEAD, *(sections[title] for title in TITLES.values() if title in sections)]
        PAGE.write_text("\n".join(text), "utf-8")


if __name__ == "__main__":
    main()
