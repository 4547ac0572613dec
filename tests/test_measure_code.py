"""tools/measure_code.py counts what it says, on a file counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import measure_code

TEXT = '''"""A module."""

# alone
import math  # beside code


def public(a: int, b) -> float:
    """Two lines

    and a blank one.
    """
    text = """no docstring,
    two code lines"""
    return math.sqrt(a)


class _Private:
    def method(self, *rest: int): ...
'''


def test_lines_of_each_sort(tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text(TEXT, "utf-8")
    found = measure_code.measure(tmp_path / "it.py")
    assert (found.raw, found.code, found.comments, found.docstrings) == (18, 7, 2, 5)
    assert sorted(found.functions) == [1, 8]
    assert found.annotations == (3, 5)  # a, return, rest of: a, b, return; rest, return
    assert found.documented == (1, 2)  # public; method is public by its name


def test_the_table_has_every_room_and_no_file_is_above_four_hundred_lines() -> None:
    root, rooms = Path(measure_code.ROOT), measure_code.rooms()
    core = {f"kdcore/{path.parent.name}" for path in (root / "kdcore").glob("*/__init__.py")}
    assert core <= {name for name, _, _ in rooms}
    assert not {str(each.path): each.raw for _, files, _ in rooms for each in files if each.raw > 400}
