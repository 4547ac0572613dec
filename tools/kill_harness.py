"""Kill runs of several recipes at random moments, resume each until done, compare everything with a whole run.

    python tools/kill_harness.py [CASE ...] [--kills 100] [--seed 0] [--out FOLDER]

Each attempt is a process of its own that gets SIGKILL after a time drawn uniformly from the length of the whole
run: between two steps, in a step, while a state is being written, between two stages, in the report. It is forked
from a process that has torch imported, so that no kill is wasted on imports; what it runs is the command line.
Compared are hashes of every file that a run leaves (weights, metrics lines, results and report without the
seconds) and the newest state of each training, tensor by tensor: student, optimiser, components, teachers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# recipe, and overrides that make it short with a state every few steps
CASES: dict[str, tuple[str, ...]] = {
    "plain": (
        "pld:digits",
        "train.epochs=30",
        "teacher.main.train.epochs=4",
        "train.checkpoint_every=7",
        "train.keep=best",
    ),
    "bank": (
        "classics:crd",
        "train.epochs=12",
        "train.eval_every=3",
        "teacher.main.train.epochs=1",
        "train.checkpoint_every=5",
    ),
    "stages": (
        "mst-distill:digits",
        "train.epochs=6",
        "stage.0.train.epochs=4",
        "stage.1.train.epochs=2",
        "train.checkpoint_every=5",
    ),
    "augmentation": (
        "hard:digits",
        "train.epochs=3",
        "train.eval_every=1",
        "teacher.main.train.epochs=1",
        "train.checkpoint_every=4",
    ),
}
SECONDS = re.compile(r"\| (student|teacher)")  # rows of the report that end with them
TIMED = ("seconds", "peak_memory")
SHARED = (
    "kdcore.api",
    "kdcore.engine",
    "torchmetrics",
    "torch._dynamo",
    "matplotlib.pyplot",
    "sklearn.datasets",
)
UNCOMPARED = (".html", ".png", ".log")  # hold seconds, or are made of what is compared


@dataclass
class Tally:
    """What became of a case."""

    kills: int = 0
    runs: int = 0
    whole_seconds: float = 0.0
    moments: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def start(command: list[str], log: Path) -> int:
    """A forked process that runs ``kd COMMAND``; its number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    os.setpgid(0, 0)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from kdcore.cli import main

    try:
        main(command)
    except SystemExit as leave:
        os._exit(int(leave.code or 0))
    finally:
        sys.stdout.flush()
        os._exit(70)


def finish(child: int, after: float | None = None) -> int | None:
    """The exit code of a process; None where it was killed, ``after`` seconds from now."""
    until = None if after is None else time.monotonic() + after
    while True:
        done, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if done:
            return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            os.killpg(child, signal.SIGKILL)  # with its data workers
            until = None
        time.sleep(0.001)


def everything(folder: Path) -> dict[str, str]:
    """Hashes of all that a run left, by file."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if "engine" in path.parts or path.suffix in UNCOMPARED:
            continue
        found[name] = _hash(path, folder)
    return found


def _hash(path: Path, folder: Path) -> str:
    if path.suffix == ".state":
        from kdcore.checkpoint import load_state
        from kdcore.guards import digest

        return digest(_timeless(load_state(path)))
    if path.suffix == ".json":
        tree = _timeless(json.loads(path.read_text("utf-8")))
        return _text(json.dumps(tree, sort_keys=True).replace(str(folder), "RUN"))
    if path.name == "report.md":  # the seconds are the last column of the models' table
        rows = path.read_text("utf-8").replace(str(folder), "RUN").splitlines()
        return _text("\n".join(re.sub(r"[^|]*\|$", "", row) if SECONDS.match(row) else row for row in rows))
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _timeless(value) for key, value in tree.items() if key not in TIMED}
    return [_timeless(each) for each in tree] if isinstance(tree, list) else tree


def difference(whole: dict[str, str], other: dict[str, str]) -> list[str]:
    """The files that are not the same in both."""
    return sorted(name for name in {*whole, *other} if whole.get(name) != other.get(name))


def torture(name: str, kills: int, rng: random.Random, out: Path) -> Tally:
    """Run a case whole, then again and again with kills, until ``kills`` processes have been killed."""
    recipe, *overrides = CASES[name]
    tally, log = Tally(), out / f"{name}.log"

    def command(folder: Path) -> list[str]:
        return ["run", recipe, *overrides, "--out", str(folder), "--quiet", "--resume"]

    began = time.monotonic()
    code = finish(start(command(out / f"{name}-whole"), log))
    if code:
        sys.exit(f"{name}: the whole run ended with {code}; see {log}")
    tally.whole_seconds = time.monotonic() - began
    whole = everything(out / f"{name}-whole")
    while tally.kills < kills:
        folder = out / f"{name}-{tally.runs}"
        code = -1
        while code != 0:
            after = rng.uniform(0, tally.whole_seconds) if tally.kills < kills else None
            code = finish(start(command(folder), log), after)
            if code is None and after is not None:
                tally.kills += 1
                tally.moments.append(after)
            elif code:
                tally.wrong.append(f"{folder.name}: resuming ended with {code}")
                break
        tally.runs += 1
        tally.wrong += [f"{folder.name}: {each} differs" for each in difference(whole, everything(folder))]
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[], metavar="CASE")
    parser.add_argument("--kills", type=int, default=100, help="in all, over the cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in SHARED:
        importlib.import_module(name)
    out = options.out or Path(tempfile.mkdtemp(prefix="kills-"))
    out.mkdir(parents=True, exist_ok=True)
    cases, rng = options.cases or list(CASES), random.Random(options.seed)
    wrong = 0
    for index, name in enumerate(cases):
        share = options.kills * (index + 1) // len(cases) - options.kills * index // len(cases)
        tally = torture(name, share, rng, out)
        wrong += len(tally.wrong)
        print(
            f"{name}: {tally.kills} kills, {tally.runs} runs to the end, {len(tally.wrong)} differences "
            f"(a whole run takes {tally.whole_seconds:.1f} s)",
            *tally.wrong,
            sep="\n  ",
            flush=True,
        )
    print(f"logs and folders: {out}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
