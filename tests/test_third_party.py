"""The examples of docs/plugins.md, taken from the page, as a third party's plugin: installed, used, not edited."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdcore
from kdcore.checkpoint import load_state

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "plugins.md").read_text("utf-8")


def example(marker: str) -> str:
    """The code block that holds ``marker``."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return next(block for block in blocks if marker in block)


@pytest.fixture
def plugin(install: Callable[..., Any], write_module: Callable[..., str]) -> None:
    code = "\n".join(example(each) for each in ("class Hint", "class Gate", "class Shift"))
    module = write_module(code)
    install(
        "theirs",
        f"""
        from kdcore import Component, hookimpl
        @hookimpl
        def kd_losses():
            yield Component("theirs", "{module}:Hint")
        @hookimpl
        def kd_routers():
            yield Component("theirs.gate", "{module}:Gate")
        @hookimpl
        def kd_augmentations():
            yield Component("theirs.shift", "{module}:Shift")
    """,
    )


def state_of(run: Any) -> dict[str, Any]:
    (path,) = (run.folder / "stages/distill/student/state").glob("*.state")
    return load_state(path)["model"]


def test_a_loss_with_its_own_projector(plugin: None, tiny: dict[str, Any], tmp_path: Path) -> None:
    reads = {"student": {"feature": "hidden0"}, "teacher": {"feature": "hidden0"}}
    tiny["loss"] = [{"use": "theirs", "weight": 0.5, "reads": reads}]
    tiny["train"]["checkpoint_every"] = 8
    run = kdcore.run(tiny, out=tmp_path / "run")
    weight = state_of(run)["losses.0.project.weight"]
    assert weight.shape == (16, 8)  # student's hidden layer to the teacher's
    first = kdcore.run(tiny, overrides=["train.epochs=1", "train.checkpoint_every=1"], out=tmp_path / "first")
    assert not (state_of_first(first)["losses.0.project.weight"] == weight).all()  # it is trained


def state_of_first(run: Any) -> dict[str, Any]:
    return load_state(sorted((run.folder / "stages/distill/student/state").glob("*.state"))[0])["model"]


def test_a_router(plugin: None, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["teacher"]["other"] = {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [12]}}
    tiny["router"] = {"use": "theirs.gate"}
    tiny["train"]["checkpoint_every"] = 8
    run = kdcore.run(tiny, out=tmp_path / "run")
    assert state_of(run)["router.gate.weight"].shape == (2, 10)
    assert {r["term"] for r in run.results["student"]["guards"]["terms"]} == {"kd", "task"}


def test_an_augmentation_with_its_own_optimiser(plugin: None, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["augmentation"] = [{"use": "theirs.shift", "optimizer": {"use": "SGD", "lr": 0.1}}]
    tiny["train"]["checkpoint_every"] = 8
    run = kdcore.run(tiny, out=tmp_path / "run")
    offset = state_of(run)["augmentations.theirs-shift.offset"]
    assert offset.abs().max() > 0  # it began at zero and was pushed


def test_the_light_module_of_the_page(install: Callable[..., Any]) -> None:
    from kdcore import plugins

    install("my-method", example("kd_plugin_my_method/__init__.py"))
    assert not plugins.registry().quarantine
    assert plugins.registry().find("loss", "my-method")[1].summary == "what it does, in a line"
