"""``run.preview``: what a loss will be given, so that it can make modules for it in ``setup``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore import InputError, building, optimizers
from kdcore.distill import Distiller
from kdcore.recipe import parse
from kdcore.stages import StageRun

CODE = """
from torch import nn
from kdcore import Loss

class Probe(Loss):
    reads = ("student.feature", "teacher.feature")

    def setup(self):
        student, teacher = self.run.preview(self)
        self.seen = student["feature"], teacher["feature"]
        self.project = nn.Linear(student["feature"].shape[1], teacher["feature"].shape[1])

    def forward(self, student, teacher, batch):
        return (self.project(student["feature"]) - teacher["feature"]).square().mean(1)

class Joint(Probe):
    joint = True

    def setup(self):
        self.student, self.teachers = self.run.preview(self)

    def forward(self, student, teachers, batch):
        return sum(each["feature"].mean(1) for each in teachers.values()) + student["feature"].mean(1)
"""
PLUGIN = """
from kdcore import Component, hookimpl

@hookimpl
def kd_losses():
    yield Component("probe", "MODULE:Probe")
    yield Component("probe.joint", "MODULE:Joint")
"""
READS = {"student": {"feature": "hidden0"}, "teacher": {"feature": "hidden0"}}


@pytest.fixture
def prepared(
    install: Callable[..., Any], write_module: Callable[..., str], tiny: dict[str, Any], tmp_path: Path
) -> Callable[..., Distiller]:
    install("probe", PLUGIN.replace("MODULE", write_module(CODE)))

    def make(**over: Any) -> Distiller:
        tree = {**tiny, "loss": [{"use": "probe", "reads": READS}], **over}
        stage = StageRun(parse(tree), "test", tmp_path)
        distiller, _ = stage.context(building.assemble(stage.recipe, stage.source, stage.builder()))
        return distiller

    return make


def test_it_is_what_forward_gets(prepared: Callable[..., Distiller]) -> None:
    distiller = prepared()
    loss: Any = distiller.parts.losses[0].loss
    assert (loss.project.in_features, loss.project.out_features) == (8, 16)
    x = distiller.run.sample["input"].flatten(1)
    teacher: Any = distiller.teachers["main"].model
    torch.testing.assert_close(loss.seen[1], teacher.hidden0(x))
    assert not loss.seen[0].requires_grad


def test_what_it_makes_is_trained(prepared: Callable[..., Distiller]) -> None:
    distiller = prepared()
    loss: Any = distiller.parts.losses[0].loss
    assert any(p is loss.project.weight for p in optimizers.trainable(distiller.parts))


def test_models_are_left_as_they_were(prepared: Callable[..., Distiller], tiny: dict[str, Any]) -> None:
    """In training mode, and with the batch statistics of no batch."""
    net = {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"width": 2}}
    tiny["data"]["args"].pop("flat")
    reads = {"student": {"feature": "pool"}, "teacher": {"feature": "pool"}}
    distiller = prepared(student=net, teacher={"main": net}, loss=[{"use": "probe", "reads": reads}])
    assert distiller.student.training
    counts = [v for k, v in distiller.student.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)


def test_one_loss_fits_itself_to_one_teacher(
    prepared: Callable[..., Distiller], tiny: dict[str, Any]
) -> None:
    two = {"a": tiny["teacher"]["main"], "b": tiny["teacher"]["main"]}
    with pytest.raises(InputError, match="fits itself to one teacher"):
        prepared(teacher=two)
    prepared(teacher=two, loss=[{"use": "probe", "reads": READS, "teacher": "b"}])


def test_a_joint_loss_sees_all_teachers(prepared: Callable[..., Distiller], tiny: dict[str, Any]) -> None:
    two = {"a": tiny["teacher"]["main"], "b": tiny["teacher"]["main"]}
    distiller = prepared(teacher=two, loss=[{"use": "probe.joint", "reads": READS}])
    loss: Any = distiller.parts.losses[0].loss
    assert list(loss.teachers) == ["a", "b"]
    assert loss.teachers["a"]["feature"].shape == (4, 16)
