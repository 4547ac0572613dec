"""CRD against the authors' code over two steps, the paper's formula, and the memory's own promises.

Numbers: HobbitLong/RepDistiller at b84f547c, crd/criterion.py and crd/memory.py, run once in float64 with the
weights, memories and negatives below; 6 samples, 5 negatives, temperature 0.07, momentum 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kd_plugin_classics.bank import MemoryBank
from kd_plugin_classics.crd import nce_loss
from torch import Tensor, nn

from kdcore import Batch, InputError, Outputs
from kdcore.distill import Distiller

Wave = Callable[..., Tensor]
SetUp = Callable[..., Distiller]
READS = {"student": {"embedding": "pool"}, "teacher": {"embedding": "pool"}}
TABLE = {"use": "classics.crd", "negatives": 5, "dim": 4, "variant": "released", "reads": READS}
IDS = torch.tensor([1, 4])
NEGATIVES = torch.tensor([[0, 2, 3, 5, 0], [2, 3, 0, 1, 1]])
# fmt: off
STEPS = [  # the sum over the batch's mean, gradients at the student's features and both heads, then the memories
    {
        "loss": 22.8189844438,
        "f_s": [-2.368099026, 0.8346293729, 2.153024227, 0.8062435937, 0.7609853778, -1.002341146],
        "w_s": [-0.9071516482, -0.4125756774, 1.013467857, 0.5372015095, 1.540923903, -0.9342806314,
                0.7183367746, 0.06286100654, -0.7345353638, -0.4886038099, -0.7222192918, 0.6747117688],
        "w_t": [-2.449466395, -0.07690448332, 1.66864194, 0.4850977831, -0.4392819249, -0.4030296982,
                0.9965175771, -0.02177805234],
        "student": [0.6577184512516067, -0.41037537037272614, -0.551931087765362, 0.307197930710446,
                    -0.4547006682664612, 0.31249782469434506, 0.7858084759813951, -0.27945921154102776],
        "teacher": [0.4419594755426792, -0.8000917438119398, 0.15943000255085077, 0.37297063925816604,
                    -0.8545707454583711, 0.4902058654859743, 0.15441929218732833, 0.07457702494894296],
    },
    {
        "loss": 16.0277346962,
        "f_s": [-1.843284282, 0.4025474046, 1.739552249, 0.5330129648, 0.7460433526, -0.7252601218],
        "w_s": [-1.044782215, -0.6644388691, 1.216000795, 0.7797012597, 1.325535562, -1.121277178,
                0.1044864408, -0.0933414208, -0.08043338452, -0.06605613908, -0.6277525436, 0.2278210571],
        "w_t": [-1.630950656, -0.08086950037, 1.927299998, 0.04991737061, 0.2316473017, -0.134123803,
                1.476565731, 0.5932786014],
        "student": [0.7105924578887101, -0.08292975305834274, -0.6891639910810973, -0.11503915962200534,
                    -0.11681502789266739, 0.6891226878767643, 0.5202261420717869, -0.4907432438832387],
        "teacher": [0.719138320510686, -0.6873942878881101, 0.06404448213699833, 0.07891434128009649,
                    -0.5447053622088935, 0.5851233960487396, -0.44091706948712267, 0.40806717291661143],
    },
]
# fmt: on
SCALE = [5.319247817363974, 297873.57708233705]


class GivenNegatives(MemoryBank):
    """A memory that draws the negatives that the authors' code was run with."""

    def draw(self, rows: Tensor, count: int, rng: torch.Generator) -> Tensor:
        assert count == NEGATIVES.shape[1]
        return NEGATIVES


def authors_crd(set_up: SetUp, wave: Wave) -> Any:
    loss: Any = set_up(TABLE).parts.losses[0].loss
    loss.project_student, loss.project_teacher = nn.Linear(3, 4).double(), nn.Linear(2, 4).double()
    values = {
        loss.project_student.weight: wave(4, 3, phase=0.2),
        loss.project_student.bias: wave(4, phase=0.5),
        loss.project_teacher.weight: wave(4, 2, phase=0.9),
        loss.project_teacher.bias: wave(4, phase=1.5),
    }
    loss.bank = GivenNegatives(torch.arange(6), torch.arange(6), 4).double()
    values |= {loss.bank.student: wave(6, 4, phase=2.1), loss.bank.teacher: wave(6, 4, phase=2.7)}
    for place, value in values.items():
        place.data.copy_(value)
    loss.scale = loss.scale.double()
    return loss


def test_two_steps_of_the_released_code(set_up: SetUp, wave: Wave) -> None:
    loss, f_s, f_t = authors_crd(set_up, wave), wave(2, 3, phase=0.3).requires_grad_(), wave(2, 2, phase=1.1)
    for expected in STEPS:
        for each in (f_s, *loss.parameters()):
            each.grad = None
        student, teacher = (Outputs(tensors={"embedding": x}) for x in (f_s, f_t))
        value = loss(student, teacher, Batch({"id": IDS})).mean()
        value.backward()
        loss.after_step()
        found = {
            "f_s": f_s.grad,
            "w_s": loss.project_student.weight.grad,
            "w_t": loss.project_teacher.weight.grad,
            "student": loss.bank.student[IDS],
            "teacher": loss.bank.teacher[IDS],
        }
        assert value.item() == pytest.approx(expected["loss"], rel=1e-10)
        for name, each in found.items():
            numbers = torch.tensor(expected[name], dtype=torch.float64)
            torch.testing.assert_close(each.flatten(), numbers, rtol=1e-7, atol=1e-9, msg=name)
        assert loss.scale.tolist() == pytest.approx(SCALE, rel=1e-10)


def test_papers_formula_in_python() -> None:
    """-log h - sum log(1 - h), h = score / (score + N / M), N = 2 negatives of M = 50 samples."""
    scores, noise = [3.0, 0.5, 2.0], 2 / 50
    h = [score / (score + noise) for score in scores]
    expected = -math.log(h[0]) - math.log(1 - h[1]) - math.log(1 - h[2])
    assert nce_loss(torch.tensor([scores], dtype=torch.float64), 50).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_paper_variant_divides_by_no_constant(set_up: SetUp, wave: Wave) -> None:
    loss: Any = set_up({**TABLE, "variant": "paper"}).parts.losses[0].loss
    assert loss.scale.tolist() == [1.0, 1.0]
    batch = loss.run.sample
    student, teacher = loss.run.preview(loss)
    value = loss(student, teacher, batch)
    rows, s, t, _ = loss._fresh
    index = torch.cat([rows[:, None], loss.bank.draw(rows, 5, loss.run.rng("classics.crd"))], 1)
    expected = torch.zeros(len(rows), dtype=torch.float64)
    for anchor, memory in ((s, loss.bank.teacher), (t, loss.bank.student)):
        scores = torch.stack(
            [(memory[i] @ a / 0.07).double().exp() for a, i in zip(anchor, index, strict=True)]
        )
        h = scores / (scores + 5 / 40)
        expected += -h[:, 0].log() - (1 - h[:, 1:]).log().sum(1)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


def test_forward_changes_no_state_and_after_step_its_rows_alone(set_up: SetUp) -> None:
    loss: Any = set_up(TABLE).parts.losses[0].loss
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert {"bank.student", "bank.teacher", "scale", "project_student.weight"} <= set(before)
    batch = loss.run.sample
    loss(*loss.run.preview(loss), batch)
    torch.testing.assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)
    loss.after_step()
    changed = (loss.bank.student != before["bank.student"]).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(loss.bank.rows(batch["id"]).tolist())
    torch.testing.assert_close(loss.bank.student[changed].norm(dim=1), torch.ones(int(changed.sum())))
    assert (loss.scale > 0).all()


# ---- the memory -------------------------------------------------------------------------------------


def test_negatives_are_uniform_over_the_other_groups() -> None:
    groups = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    bank = MemoryBank(torch.arange(7), groups, dim=2)
    rows = torch.arange(7)
    drawn = bank.draw(rows, 7000, torch.Generator().manual_seed(0))
    for row in rows:
        others = (groups != groups[row]).nonzero().flatten()
        share = torch.bincount(drawn[row], minlength=7) / 7000
        assert share[groups == groups[row]].sum() == 0
        assert (share[others] - 1 / len(others)).abs().max() < 0.03


def test_draws_follow_the_generator_alone() -> None:
    bank = MemoryBank(torch.arange(9), torch.arange(9) % 3, dim=2)
    first, again, other = (
        bank.draw(torch.arange(9), 5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_by_id_in_any_order() -> None:
    ids = torch.tensor([70, 3, 900, 41])
    bank = MemoryBank(ids, torch.tensor([0, 1, 0, 1]), dim=2)
    rows = bank.rows(torch.tensor([900, 3, 70]))
    assert rows.tolist() == [3, 0, 2]
    assert (bank.draw(rows[:1], 50, torch.Generator()).unique() == torch.tensor([0, 1])).all()  # ids 3 and 41
    for unknown in (4, 1000):
        with pytest.raises(InputError, match="not in the memory"):
            bank.rows(torch.tensor([3, unknown]))


def test_one_class_has_no_negatives() -> None:
    with pytest.raises(InputError, match="one class"):
        MemoryBank(torch.arange(3), torch.zeros(3, dtype=torch.int64), dim=2)


def test_sampling_by_instance_draws_all_others(set_up: SetUp) -> None:
    loss: Any = set_up({**TABLE, "sampling": "instance"}).parts.losses[0].loss
    drawn = loss.bank.draw(torch.tensor([0]), 2000, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == list(range(1, 40))
