"""``Augmentation.draw``: which samples come next, in blocks that are epochs and part of the run's state."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import kdcore
from kdcore import InputError, building
from kdcore.order import Order

CODE = """
import json
import torch
from kdcore import Augmentation

class Last(Augmentation):
    '''Draws the last ten samples over and over; notes what it was asked and what came.'''
    changes_inputs = False

    def __init__(self, *, file: str, every: int | None = None, count: int = 96, low: int = 90) -> None:
        super().__init__()
        self.file, self.draw_every, self.count, self.low = file, every, count, low

    def draw(self, size, epoch):
        self.note(f"draw {size} {epoch} {self.run.step}")
        return torch.randint(self.low, 100, (self.count,), generator=self.run.rng("last"))

    def before_step(self, batch):
        self.note(json.dumps(batch["id"].tolist()))

    def note(self, text):
        with open(self.file, "a") as file:
            file.write(text + "\\n")
"""
PLUGIN = """
from kdcore import Component, hookimpl

@hookimpl
def kd_augmentations():
    yield Component("last", "MODULE:Last")
"""


@pytest.fixture
def recipe(
    install: Callable[..., Any], write_module: Callable[..., str], tiny: dict[str, Any], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    install("last", PLUGIN.replace("MODULE", write_module(CODE)))

    def make(**params: Any) -> dict[str, Any]:
        tiny["augmentation"] = [{"use": "last", "file": str(tmp_path / "notes"), **params}]
        return tiny

    return make


def notes(tmp_path: Path) -> tuple[list[str], list[list[int]]]:
    lines = (tmp_path / "notes").read_text().splitlines()
    return [x for x in lines if x.startswith("draw")], [json.loads(x) for x in lines if x.startswith("[")]


def test_a_drawn_block_is_an_epoch(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """100 samples in batches of 32 are 4 steps an epoch; with ``draw_every = 3`` an epoch is 3 steps."""
    kdcore.run(recipe(count=100), out=tmp_path / "whole")
    asked, batches = notes(tmp_path)
    assert asked == ["draw 100 0 0", "draw 100 1 4"]
    assert [len(ids) for ids in batches] == [32, 32, 32, 4] * 2
    (tmp_path / "notes").unlink()
    result = kdcore.run(recipe(every=3, count=96), out=tmp_path / "run").results
    asked, batches = notes(tmp_path)
    assert asked == ["draw 100 0 0", "draw 100 1 3"]
    assert [len(ids) for ids in batches] == [32] * 6
    assert result["student"]["steps"] == 6
    assert len({i for ids in batches for i in ids}) == 10  # of 100 samples, only those that were drawn
    whole = kdcore.run(recipe(low=0, every=3), out=tmp_path / "all").results
    assert whole["student"]["metrics"] != result["student"]["metrics"]


def test_a_run_resumed_inside_a_block_goes_on_with_it(recipe: Callable[..., Any], tmp_path: Path) -> None:
    tree = recipe(every=4, count=128)
    kdcore.run(tree, out=tmp_path / "whole")
    asked, batches = notes(tmp_path)
    (tmp_path / "notes").unlink()
    over = ["train.checkpoint_every=3"]
    steps = 0

    def stopping(self: Any, batch: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise ConnectionError("power cut")
        self.note(json.dumps(batch["id"].tolist()))

    kind = building.schema("augmentation", "last", "test")[0]
    before = kind.before_step
    kind.before_step = stopping
    with pytest.raises(ConnectionError):
        kdcore.run(tree, out=tmp_path / "run", overrides=over)
    kind.before_step = before
    kdcore.run(tree, out=tmp_path / "run", overrides=over, resume=True)
    again, seen = notes(tmp_path)
    assert again == [*asked, "draw 100 1 4"]  # the second block was not in the state of step 3
    assert seen == [*batches[:5], *batches[3:]]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"every": 4, "count": 90}, "90 indices"),
        ({"low": -3}, "indices from -"),
        ({"count": 0}, "given   'none'"),
    ],
)
def test_a_block_that_does_not_do_is_refused(
    params: dict[str, Any], words: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="draws no such samples") as error:
        kdcore.run(recipe(**params), out=tmp_path / "run")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "block",
    [torch.ones(10, dtype=torch.bool), torch.rand(10), torch.zeros(10, 1, dtype=torch.int64), [0] * 10],
)
def test_a_block_that_holds_no_indices_is_refused(block: Any) -> None:
    """As numbers, a choice by True and False would be samples 1 and 0."""
    order = Order({"main": 10}, {"main": 4}, "main", 0)
    order.follow(lambda size, epoch: block, None)
    with pytest.raises(InputError, match="draws no indices"):
        order.begin_epoch(0)


APART = CODE.replace("self.run.rng(", "self.run.rng(shared=False, key=")


@pytest.mark.parametrize(("code", "said"), [(CODE, ""), (APART, "draws other samples in each process")])
def test_two_processes_draw_the_same_or_are_told(
    code: str, said: str, tiny: dict[str, Any], tmp_path: Path, torchrun_line: Callable[..., list[str]]
) -> None:
    """What each draws for itself would make batches that no single process has."""
    (tmp_path / "drawn.py").write_text(code, "utf-8")
    (tmp_path / "plugin_drawn.py").write_text(PLUGIN.replace("MODULE", "drawn"), "utf-8")
    installed = tmp_path / "kd_plugin_last-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kd-plugin-last\nVersion: 0.1\n", "utf-8"
    )
    (installed / "entry_points.txt").write_text("[kdcore]\nlast = plugin_drawn\n", "utf-8")
    tiny["augmentation"] = [{"use": "last", "file": str(tmp_path / "notes"), "count": 100}]
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tiny), "utf-8")
    command = ["-m", "kdcore", "run", "recipe.toml", "--out", "run", "--quiet"]
    done = subprocess.run(
        torchrun_line(2, *command),
        cwd=tmp_path,  # with -m it is on the path, so the plugin is installed there
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode == 0) == (not said), done.stderr
    assert said in done.stderr


def test_two_that_draw_are_refused(recipe: Callable[..., Any], tmp_path: Path) -> None:
    tree = recipe()
    tree["augmentation"] *= 2
    with pytest.raises(InputError, match="two of them draw"):
        kdcore.run(tree, out=tmp_path / "run")
