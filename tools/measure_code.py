"""Sizes of the code, in the measures that the project compares itself with other codebases by.

A code line is none of blank, comment, docstring. Of a room's files with more than 3 code lines: their raw lines
(median, 90th percentile, longest), the lines of its functions, comments and docstrings per 100 code lines, the
share of public classes and functions with a docstring, and of annotated parameters and returns. The last column is
code lines of tests per code line of source, where a room has tests of its own.

    python tools/measure_code.py [--files] [--json FILE]
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Measured:
    """One file: lines of each sort, the lines of each function, and how many annotations there could be and are."""

    path: Path
    raw: int
    code: int
    comments: int
    docstrings: int
    functions: list[int]
    annotations: tuple[int, int]
    documented: tuple[int, int]


def measure(path: Path) -> Measured:
    text = path.read_text("utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    documented = {line for node in nodes for line in _docstring(node)}
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    comments = [t for t in tokens if t.type == tokenize.COMMENT]
    alone = {t.start[0] for t in comments if not t.line[: t.start[1]].strip()}
    lines = enumerate(text.splitlines(), 1)
    code = sum(bool(line.strip()) and n not in documented | alone for n, line in lines)
    functions = [node for node in nodes if isinstance(node, Function)]
    there = [slot is not None for each in functions for slot in _annotations(each)]
    lengths = [(each.end_lineno or 0) - each.lineno + 1 for each in functions]
    public = [n for n in nodes if isinstance(n, ast.ClassDef | Function) and not n.name.startswith("_")]
    told = sum(ast.get_docstring(node) is not None for node in public)
    return Measured(
        path,
        text.count("\n"),
        code,
        len(comments),
        len(documented),
        lengths,
        (sum(there), len(there)),
        (told, len(public)),
    )


def _docstring(node: ast.AST) -> Iterable[int]:
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or ast.get_docstring(node) is None:
        return ()
    return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


def _annotations(function: Function) -> Iterator[ast.expr | None]:
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    yield from (a.annotation for a in given if a.arg not in ("self", "cls"))
    yield from (a.annotation for a in (arguments.vararg, arguments.kwarg) if a is not None)
    yield function.returns


@dataclass
class Row:
    """A room of the table; ``tests`` is None where its tests lie in another."""

    room: str
    files: int
    code: int
    median: int
    p90: int
    longest: int
    function_median: int
    function_p90: int
    comments: int
    docstrings: int
    documented: int
    typed: int
    tests: float | None = None


def row(room: str, files: list[Measured], tests: Iterable[Measured] = ()) -> Row:
    kept = [each for each in files if each.code > 3]
    raw, code = sorted(each.raw for each in kept), sum(each.code for each in files)
    functions = sorted(n for each in kept for n in each.functions) or [0]

    def share(pairs: Iterable[tuple[int, int]]) -> int:
        done, all_ = map(sum, zip(*pairs, strict=True))
        return round(100 * done / max(all_, 1))

    tested = sum(each.code for each in tests)
    return Row(
        room,
        len(kept),
        code,
        round(statistics.median(raw)),
        _p90(raw),
        raw[-1],
        round(statistics.median(functions)),
        _p90(functions),
        round(100 * sum(each.comments for each in kept) / code),
        round(100 * sum(each.docstrings for each in kept) / code),
        share(each.documented for each in kept),
        share(each.annotations for each in kept),
        round(tested / code, 2) if tested else None,
    )


def _p90(ordered: list[int]) -> int:
    return ordered[min(int(0.9 * len(ordered)), len(ordered) - 1)]


def rooms(root: Path = ROOT) -> list[tuple[str, list[Measured], list[Measured]]]:
    """(name, files, tests): the core's modules, each of its subpackages, then plugins, exporters, tools."""

    def files(folder: Path, pattern: str) -> list[Measured]:
        found = sorted(path for path in folder.glob(pattern) if "templates" not in path.parts)
        return [measure(path) for path in found]

    core = root / "kdcore"
    found: list[tuple[str, list[Measured], list[Measured]]]
    found = [("kdcore (core path)", files(core, "*.py"), [])]
    for folder in sorted(path.parent for path in core.glob("*/__init__.py")):
        found.append((f"kdcore/{folder.name}", files(folder, "**/*.py"), []))
    found.append(("kdcore, all", files(core, "**/*.py"), files(root / "tests", "**/*.py")))
    for name, package in (("plugins", "kd_plugin_*"), ("exporters", "kd_exporter_*")):
        found.append(
            (name, files(root / name, f"*/{package}/**/*.py"), _tests(files(root / name, "*/**/*.py")))
        )
    return [*found, ("tools", files(root / "tools", "*.py"), [])]


def _tests(files: list[Measured]) -> list[Measured]:
    return [each for each in files if each.path.name.startswith(("test_", "conftest"))]


HEAD = {
    "room": "",
    "files": "files",
    "code": "code lines",
    "median": "median",
    "p90": "p90",
    "longest": "longest",
    "function_median": "functions",
    "function_p90": "their p90",
    "comments": "comments",
    "docstrings": "docstrings",
    "documented": "documented, %",
    "typed": "typed, %",
    "tests": "tests",
}


def table(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    lines = ["| " + " | ".join(HEAD.values()) + " |", "|" + " --- |" * len(HEAD)]
    for each in rows:
        values = asdict(each).values()
        lines.append("| " + " | ".join("" if value is None else str(value) for value in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", action="store_true", help="each file of the core, longest first")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = rooms()
    rows = [row(*each) for each in found]
    print(table(rows))
    if options.files:
        core = {name: files for name, files, _ in found}["kdcore, all"]
        for each in sorted(core, key=lambda m: -m.code):
            print(f"{each.code:5} {each.raw:5}  {each.path.relative_to(ROOT)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in rows], indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
