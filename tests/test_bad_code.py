"""What a recipe's own code and data do wrong: said in words, with the place, and never taken for a run that is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import kdcore
from kdcore import cli
from kdcore.errors import InputError, RunError

OWN = """
    import sys
    from kdcore.datasets import digits

    def exits():
        sys.exit(0)

    class Items:
        def __init__(self, inner, bad):
            self.inner, self.bad = inner, bad

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            if index == self.bad:
                raise ValueError("corrupt jpeg")
            return self.inner[index]

    def corrupt(*, split: str = "train", index: int = 33):
        data = digits(labels=100, flat=True)
        setattr(data, split, Items(getattr(data, split), index))
        return data

    class Batches(Items):
        def batch(self, index):
            if self.bad in index.tolist():
                sys.exit(0)
            return self.inner.batch(index)

    def leaving():
        data = digits(labels=100, flat=True)
        data.train = Batches(data.train, 33)
        return data
"""


@pytest.fixture
def own(write_module: Callable[..., str]) -> str:
    return write_module(OWN)


@pytest.mark.parametrize("place", ["data.source", "student.model", "teacher.main.model"])
@pytest.mark.parametrize("option", ["--check", "--quiet"])
def test_code_that_exits_is_no_run_that_is_done(
    place: str,
    option: str,
    own: str,
    tiny: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, args = tmp_path / "recipe.toml", place.replace("source", "model").replace("model", "args")
    recipe.write_text(tomli_w.dumps(tiny), "utf-8")
    with pytest.raises(SystemExit) as left:
        cli.main(
            ["run", str(recipe), option, f"{place}={own}:exits", f"{args}={{}}", "--out", str(tmp_path / "o")]
        )
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert place.rpartition(".")[0] in said
    assert "SystemExit: 0" in said
    assert not (tmp_path / "o").exists()


def test_code_that_exits_in_the_middle(own: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"] |= {"source": f"{own}:leaving", "args": {}}
    with pytest.raises(RunError, match=r"samples .* of 'train': SystemExit: 0"):
        kdcore.run(tiny, out=tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_fails_in_the_middle_has_its_number(
    workers: int, own: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["data"] |= {"source": f"{own}:corrupt", "args": {}, "workers": workers}
    for resume in (False, True):
        with pytest.raises(RunError, match="sample 33 of 'train': ValueError: corrupt jpeg") as caught:
            kdcore.run(tiny, out=tmp_path / "run", resume=resume)
        assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_sample_of_another_split_fails(split: str, own: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"] |= {"source": f"{own}:corrupt", "args": {"split": split}}
    with pytest.raises(RunError, match=f"sample 33 of '{split}': ValueError: corrupt jpeg"):
        kdcore.run(tiny, out=tmp_path / "run")


def test_a_first_sample_that_fails_is_wrong_input(own: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"] |= {"source": f"{own}:corrupt", "args": {"index": 2}}
    with pytest.raises(
        InputError, match=r"data\.source: [\s\S]*sample 2 of 'train': ValueError: corrupt jpeg"
    ):
        kdcore.check(tiny)
