"""FitNet: the hint loss by hand, the regressor's geometry, and the component in a run.

``released`` follows costs/HintCost.py of adri-romsor/FitNets@0f633b1b, which was read, not run (Theano).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_classics.fitnet import hint_loss, regressor
from torch import Tensor, nn

import kdcore
from kdcore import InputError
from kdcore.distill import Distiller
from kdcore.optimizers import trainable

Wave = Callable[..., Tensor]
SetUp = Callable[..., Distiller]
TABLE = {
    "use": "classics.fitnet",
    "reads": {"student": {"feature": "body.0"}, "teacher": {"feature": "body.0"}},
}


def test_variants_by_hand() -> None:
    """One sample of two channels and two positions; differences 1, 2, 3, 4."""
    guided, hint = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]), torch.zeros(1, 2, 1, 2)
    assert hint_loss(guided, hint).tolist() == [(1 + 4 + 9 + 16) / 2]
    assert hint_loss(guided, hint, variant="released").tolist() == [((1 + 9) / 2 + (4 + 16) / 2) / 2]
    assert hint_loss(guided, hint, variant="repdistiller").tolist() == [30 / 4]


def test_vectors_have_one_position() -> None:
    guided, hint = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)
    assert hint_loss(guided, hint).tolist() == hint_loss(guided, hint, variant="released").tolist() == [5.0]


def test_no_gradient_to_the_teacher() -> None:
    s, t = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    hint_loss(s, t).sum().backward()
    assert t.grad is None


# HobbitLong/RepDistiller@b84f547c, models/util.py: ConvReg, run once
REPDISTILLER = [  # size of the student's map, of the teacher's, what ConvReg makes of 3 to 5 channels
    (4, 4, "Conv2d(3, 5, kernel_size=(1, 1), stride=(1, 1))"),
    (4, 2, "Conv2d(3, 5, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))"),
    (4, 8, "ConvTranspose2d(3, 5, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))"),
    (6, 4, "Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))"),
]


@pytest.mark.parametrize("mine, theirs, layer", REPDISTILLER)
def test_repdistillers_regressor(mine: int, theirs: int, layer: str) -> None:
    made = regressor((1, 3, mine, mine), (1, 5, theirs, theirs), "repdistiller")
    assert [type(m) for m in made][1:] == [nn.BatchNorm2d, nn.ReLU]
    assert repr(made[0]) == layer
    assert made(torch.zeros(2, 3, mine, mine)).shape == (2, 5, theirs, theirs)


def test_papers_regressor_has_no_padding() -> None:
    made = regressor((1, 3, 6, 4), (1, 5, 3, 4))
    assert repr(made[0]) == "Conv2d(3, 5, kernel_size=(4, 1), stride=(1, 1))"
    assert isinstance(made[1], nn.ReLU)
    assert len(regressor((1, 3), (1, 5), relu=False)) == 1


@pytest.mark.parametrize(
    "mine, theirs", [((1, 3, 2, 2), (1, 5, 4, 4)), ((1, 3), (1, 5, 4, 4)), ((1, 3, 4), (1, 3, 4))]
)
def test_layers_that_do_not_fit(mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="classics"):
        regressor(mine, theirs)


@pytest.mark.parametrize("variant", ["paper", "repdistiller"])
def test_setup_makes_a_trained_regressor_that_is_not_shipped(set_up: SetUp, variant: str) -> None:
    distiller = set_up({**TABLE, "variant": variant})
    loss: Any = distiller.parts.losses[0].loss
    assert loss.regressor[0].weight.shape == (6, 4, 1, 1)
    trained = {id(p) for p in trainable(distiller.parts)}
    assert {id(p) for p in loss.parameters()} <= trained
    shipped = distiller.student.parameters_to_ship()
    assert not [name for name in shipped if "regressor" in name]
    assert loss.couples_batch == (variant == "repdistiller")


def test_setup_leaves_the_students_statistics(set_up: SetUp) -> None:
    """Shapes are asked for in eval mode: no batch norm of the student has seen a batch."""
    counts = [v for k, v in set_up(TABLE).student.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)


def test_two_stages_of_the_paper(tmp_path: Path) -> None:
    """First the hint alone, then distillation of the student that it left: what the README shows."""
    net = {"use": "module", "model": "kdcore.zoo:conv_net"}
    recipe = {
        "data": {"source": "kdcore.datasets:digits", "args": {"labels": 40}, "batch_size": 20},
        "teacher": {"main": {**net, "args": {"width": 4}, "train": {"epochs": 1}}},
        "student": {**net, "args": {"width": 2}},
        "train": {"epochs": 1},
        "stage": [
            {"use": "distill", "name": "hint", "task": {"weight": 0.0}, "loss": [TABLE]},
            {
                "use": "distill",
                "name": "distil",
                "student": {"checkpoint": "@hint.student"},
                "loss": [{"use": "kd", "temperature": 4.0}],
            },
        ],
    }
    stages = kdcore.run(recipe, out=tmp_path / "run").folder / "stages"
    terms = {}
    for stage in ("hint", "distil"):
        guards = json.loads((stages / stage / "student" / "result.json").read_text("utf-8"))["guards"]
        terms[stage] = {term["term"] for term in guards["terms"]}
    assert terms == {"hint": {"classics-fitnet"}, "distil": {"kd", "task"}}
