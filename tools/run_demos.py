"""Every method's demonstration, one after the other: the commands of the READMEs' evidence, run in FOLDER.

python tools/run_demos.py [SLUG ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLASSICS = ("fitnet", "at", "rkd", "dkd", "dist", "crd")
TOOLBOXES = {
    "classics": [f"kd compare classics:{name} --seeds 5 --jobs 2" for name in CLASSICS],
    "hf": ["kd compare hf:text --seeds 3 --jobs 2"],
}


def demos() -> dict[str, list[str]]:
    """The commands by slug: of plugins/SLUG/evidence.json, each once, and of the toolboxes."""
    found = dict(TOOLBOXES)
    for path in sorted(ROOT.glob("plugins/*/evidence.json")):
        commands = [entry["command"] for entry in json.loads(path.read_text("utf-8"))]
        found[path.parent.name] = list(dict.fromkeys(commands))
    return dict(sorted(found.items()))


def runnable(command: str) -> list[str]:
    """The same with this environment's interpreter; raises SystemExit for what is neither kd nor python."""
    program, *arguments = shlex.split(command)
    if program not in ("kd", "python"):
        sys.exit(f"{command}: a demonstration is a kd or a python command")
    return [sys.executable, *(["-m", "kdcore"] if program == "kd" else []), *arguments]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = demos()
    parser.add_argument("slugs", nargs="*", choices=[[], *commands], default=[], metavar="SLUG")
    parser.add_argument("--out", type=Path, default=Path("runs/demos"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for slug in options.slugs or commands:
        for command in commands[slug]:
            print(f"== {slug}: {command}", flush=True)
            subprocess.run(runnable(command), check=True, cwd=options.out)


if __name__ == "__main__":
    main()
