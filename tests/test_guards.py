"""Guards: dead terms, NaN, a teacher that moved."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kdcore
from kdcore.errors import RunError
from kdcore.guards import Guards
from kdcore.types import Outputs


def look(weights: dict[str, float], step: int = 0, guards: Guards | None = None) -> Guards:
    logits = torch.tensor([[1.0, 2.0]], requires_grad=True)
    terms = {
        name: (weight, (logits.sum() if name != "nan" else logits.sum() * float("nan")))
        for name, weight in weights.items()
    }
    guards = guards or Guards()
    guards.look(terms, [Outputs(logits=logits)], step)
    return guards


def test_value_gradient_norm_and_share() -> None:
    readings = look({"a": 1.0, "b": 3.0}).readings
    # d(w * sum)/d logits = (w, w): norm w sqrt(2)
    assert [r.gradient_norm for r in readings] == pytest.approx([2**0.5, 3 * 2**0.5])
    assert [r.share for r in readings] == pytest.approx([0.25, 0.75])
    assert [r.value for r in readings] == [3.0, 3.0]


def test_a_dead_term_is_a_warning_with_its_share() -> None:
    guards = look({"kd": 1e-4, "task": 1.0})
    assert len(guards.warnings) == 1
    assert "'kd' is dead" in guards.warnings[0]
    assert not look({"kd": 0.02, "task": 1.0}).warnings


def test_a_scheduled_term_is_looked_at_when_it_first_acts() -> None:
    guards = look({"task": 1.0})
    look({"task": 1.0, "late": 0.5}, step=7, guards=guards)
    look({"task": 1.0, "late": 1.0}, step=8, guards=guards)
    assert [(r.term, r.step) for r in guards.readings] == [("task", 0), ("late", 7)]


def test_nan_ends_the_run_with_the_terms_name() -> None:
    with pytest.raises(RunError, match="'nan' is nan"):
        look({"nan": 1.0})


@pytest.mark.parametrize("change", ["weight", "buffer", "mode"])
def test_a_teacher_that_moved_is_found(change: str) -> None:
    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    guards = Guards()
    guards.remember({"main": teacher})
    guards.unchanged({"main": teacher})
    with torch.no_grad():
        if change == "weight":
            teacher[0].weight.add_(0.0)  # in place counts, whatever the value
        elif change == "buffer":
            teacher.train()(torch.randn(4, 2))
            teacher.eval()
        else:
            teacher[1].train()
    with pytest.raises(RunError, match="training mode" if change == "mode" else "was changed"):
        guards.unchanged({"main": teacher})


def test_the_teacher_of_a_run_stays_in_eval_mode(tiny: dict[str, Any], tmp_path: Any) -> None:
    """A teacher with batch norm: its running statistics after the run are those before it."""
    tiny["data"]["args"]["flat"] = False
    tiny["teacher"]["main"] = {
        "use": "module",
        "model": "kdcore.zoo:conv_net",
        "args": {"width": 4},
        "train": {"epochs": 1},
    }
    run = kdcore.run(tiny, out=tmp_path / "run")
    guards = run.results["student"]["guards"]
    assert {r["term"] for r in guards["terms"]} == {"kd", "task"}
    assert sum(r["share"] for r in guards["terms"]) == pytest.approx(1.0)


def test_a_teacher_whose_weights_come_from_nowhere_is_a_warning(tiny: dict[str, Any], tmp_path: Any) -> None:
    trained = kdcore.run(tiny, out=tmp_path / "trained")
    assert "neither checkpoint nor train" not in (trained.folder / "report.md").read_text("utf-8")
    del tiny["teacher"]["main"]["train"]
    random = kdcore.run(tiny, out=tmp_path / "random")
    assert "teacher.main has neither checkpoint nor train" in (random.folder / "report.md").read_text("utf-8")


HOLDING = """
    import torch
    from torch import nn
    from kdcore import Component, hookimpl
    from kdcore.kinds import Loss

    modes, CRASH_AT = set(), set()

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))

        def forward(self, input):
            if torch.is_grad_enabled() is False:  # asked as a teacher
                modes.update(module.training for module in self.modules())
            return super().forward(input)

    class Holding(Loss):
        def setup(self):
            self.held = self.run.teachers["main"].model

        def forward(self, student, teacher, batch):
            return (student.logits - teacher.logits).square().mean(-1)

        def after_step(self):
            if self.run.step in CRASH_AT:
                CRASH_AT.discard(self.run.step)
                raise KeyError(self.run.step)

    @hookimpl
    def kd_losses():
        yield Component("holding", f"{__name__}:Holding")
"""


def holding(install: Callable[..., Any], tiny: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A loss that holds a teacher's module with dropout, as one that reuses its classifier would."""
    name = install("holding", HOLDING).target
    net = {"use": "module", "model": f"{name}:Net"}
    tiny |= {"teacher": {"main": net}, "loss": [{"use": "holding"}]}
    return importlib.import_module(name), tiny


def test_a_teacher_is_in_eval_mode_also_where_a_loss_holds_it(
    install: Callable[..., Any], tiny: dict[str, Any], tmp_path: Any
) -> None:
    module, recipe = holding(install, tiny)
    kdcore.run(recipe, out=tmp_path / "run")
    assert module.modes == {False}


def test_a_resumed_run_does_not_take_its_own_state_for_a_change(
    install: Callable[..., Any], tiny: dict[str, Any], tmp_path: Any
) -> None:
    module, recipe = holding(install, tiny)
    recipe["train"] |= {"checkpoint_every": 2}
    module.CRASH_AT.add(5)
    with pytest.raises(KeyError):
        kdcore.run(recipe, out=tmp_path / "run")
    assert kdcore.run(recipe, out=tmp_path / "run", resume=True).results["student"]["steps"] == 8


@pytest.mark.parametrize("weights", ["ema", "initial", "current"])
def test_the_student_as_its_own_teacher_is_asked_in_eval_mode(
    weights: str, install: Callable[..., Any], tiny: dict[str, Any], tmp_path: Any
) -> None:
    module, recipe = holding(install, tiny)
    recipe |= {"student": recipe["teacher"]["main"], "loss": [{"use": "kd"}]}
    recipe["teacher"] = {"main": {"use": "self", "weights": weights}}
    kdcore.run(recipe, out=tmp_path / "run")
    assert module.modes == {False}
