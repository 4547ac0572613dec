"""MST-Distill's mathematics: numbers of the authors' code (Gray-OREO/MST-Distill, 093b2fe) and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_mst_distill.loss import MSTLoss, divergence, mst_loss, scheduled
from kd_plugin_mst_distill.masks import MaskNet, fitting
from kd_plugin_mst_distill.router import DenseGateNet, Gate, GateNet, load_balance
from kd_plugin_mst_distill.stages import CoTraining
from torch import Tensor, nn

from kdcore import Batch, InputError, Outputs, Student, Teacher
from kdcore.context import RunContext
from kdcore.data import Source
from kdcore.distill import Distiller
from kdcore.parts import Parts, Slot
from kdcore.tables import DataTable, TaskTable
from kdcore.task import Task

NAMES = ("a", "b", "c", "d")


def wave(*shape: int, phase: float) -> Tensor:
    """2 sin(1.7 i + phase) in float64: the tensors that the authors' code was run on."""
    flat = [2 * math.sin(1.7 * i + phase) for i in range(math.prod(shape))]
    return torch.tensor(flat, dtype=torch.float64).reshape(shape)


def filled(module: nn.Module) -> nn.Module:
    """Weights that are waves by their place in the state dict, whatever their names."""
    for index, value in enumerate(module.double().state_dict().values()):
        if value.dtype.is_floating_point:
            value.copy_(0.5 * wave(*value.shape, phase=0.3 * index))
    return module.eval()


# ---- numbers of the authors' code -------------------------------------------------------------------


def test_the_symmetric_divergence_has_both_gradients() -> None:
    s, t = wave(3, 4, phase=0.0).requires_grad_(), wave(3, 4, phase=1.0).requires_grad_()
    loss = divergence(s, t).mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.9353599778439561, rel=1e-12)
    assert s.grad is not None
    assert t.grad is not None
    pupil = [-0.15157239972656755, 0.14299374054388747, 0.08978207611389337, -0.08120341693121318]
    guide = [0.15326971301685707, -0.1455376045763737, -0.08574338404632574, 0.0780112756058423]
    assert s.grad[0].tolist() == pytest.approx(pupil, rel=1e-9)
    assert t.grad[0].tolist() == pytest.approx(guide, rel=1e-9)


def test_dense_logits_are_averaged_over_space() -> None:
    s = wave(2, 3, 2, 2, phase=0.0).requires_grad_()
    loss = mst_loss(s, wave(2, 3, 2, 2, phase=1.0)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.15303081194417356, rel=1e-12)
    assert s.grad is not None
    first = [-0.02984028499962471, -0.02067741427155309, 0.038010439405909424, 0.008634502100129476]
    assert s.grad.flatten()[:4].tolist() == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize(
    ("form", "value", "row"),
    [
        (
            "KL",
            0.10291878751739354,
            [-0.02552705451164271, -0.08522678124413911, -0.3961080020185077, -0.037639391424694],
        ),
        (
            "CV",
            0.8085542705036215,
            [0.15447693517089192, -0.2980298670157697, -0.44988670314520196, -0.0534037814128175],
        ),
    ],
)
def test_load_balance(form: Any, value: float, row: list[float]) -> None:
    gate = wave(5, 4, phase=0.7).softmax(1).requires_grad_()
    loss = load_balance(gate, form)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-9)
    assert gate.grad is not None
    assert gate.grad[3].tolist() == pytest.approx(row, rel=1e-9)


def test_gates_with_the_authors_weights() -> None:
    rows = [
        [8.581051160182863, -4.60432713477592, -1.4000548942403888, 5.531663531860498],
        [3.451060956948781, 2.9213946843119363, -7.020793895178526, 6.035343327532226],
    ]
    assert torch.allclose(
        filled(GateNet(3, 4))(wave(2, 3, phase=0.2)), torch.tensor(rows, dtype=torch.float64)
    )
    dense = [
        [3.2635031290740333, -0.6302985225107743, -2.431448876022092, 2.9534022643181195],
        [2.8859975574930385, -0.4291991693477929, -2.3412200256595064, 2.623408173883344],
    ]
    said = filled(DenseGateNet(3, 4))(wave(2, 3, 5, 5, phase=0.2))
    assert torch.allclose(said, torch.tensor(dense, dtype=torch.float64))


def test_masks_with_the_authors_weights() -> None:
    rows = [
        [0.7708926114512631, 0.8727678738256185, 0.8495217072913136, 0.0005859506196897933],
        [0.3898780864664616, 0.6609817795996199, 0.910037078075502, 2.5308919639430596e-05],
    ]
    said = filled(MaskNet(4, 6, 3))(wave(2, 4, phase=0.4))
    assert torch.allclose(said, torch.tensor(rows, dtype=torch.float64))
    spatial = filled(MaskNet(4, 6, 3, spatial=True))
    spatial.get_buffer("reduce.2.running_var").copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    rows = [
        [0.9983439673245773, 0.9883851707209088, 0.9849141665710874, 0.9999853428876316],
        [0.9983455043314257, 0.9898060103473817, 0.9849492608055392, 0.9999850978853935],
    ]
    assert torch.allclose(spatial(wave(2, 4, 5, 5, phase=0.4)), torch.tensor(rows, dtype=torch.float64))


# ---- the routed step --------------------------------------------------------------------------------


class Given(Student):
    """Logits as a parameter, row by sample id."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(wave(5, 3, phase=0.0))

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(logits=self.z[batch["id"]])


class Fixed(Teacher):
    def __init__(self, phase: float) -> None:
        super().__init__()
        self.z, self.asked = wave(5, 3, phase=phase), list[int]()

    def forward(self, batch: Batch) -> Outputs:
        self.asked += batch["id"].tolist()
        return Outputs(logits=self.z[batch["id"]])


class FixedGate(nn.Module):
    """Says log g for the gate probabilities that the authors' code was given."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(wave(5, 4, phase=0.7))

    def forward(self, logits: Tensor) -> Tensor:
        return self.g + 0 * logits.sum()


Make = Callable[..., tuple[Distiller, Gate]]


def student_of(distiller: Distiller) -> Tensor:
    assert isinstance(distiller.student, Given)
    return distiller.student.z


def teachers_of(distiller: Distiller) -> list[Fixed]:
    return [teacher for teacher in distiller.teachers.values() if isinstance(teacher, Fixed)]


BATCH = Batch({"id": torch.arange(5), "target": torch.arange(5) % 3})


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The step of stage 3 on the authors' tensors: four teachers, one router."""

    def made(gate: nn.Module | None = None, **params: Any) -> tuple[Distiller, Gate]:
        router = Gate(**params)
        teachers: dict[str, Teacher] = {name: Fixed(1.0 + j) for j, name in enumerate(NAMES)}
        parts = Parts(Given(), Task(TaskTable(), 3), teachers, router, NAMES)
        parts.losses, parts.needs = [Slot("kd", MSTLoss(), 1.0, NAMES)], {name: {"logits"} for name in NAMES}
        distiller = Distiller(parts)
        source = Source(DataTable(use="ids", count=5, batch_size=5), 0)
        run = RunContext(distiller, source, seed=0, folder=tmp_path, artefacts={})
        distiller.attach(run)
        torch.manual_seed(0)
        distiller.events.setup()
        router.gate = gate or router.gate  # type: ignore[assignment]
        return distiller, router

    return made


@pytest.mark.parametrize(
    ("k", "value", "gradient"),
    [
        (1, 1.7596314983022823, 1.6433778594991895),
        (2, 1.9013138427935738, 1.4439535729187818),
        (4, 2.5121663511784478, 1.6840413345371423),
    ],
)
def test_released_routing_has_the_authors_value_and_gradient(
    make: Make, k: int, value: float, gradient: float
) -> None:
    distiller, router = make(FixedGate(), k=k, variant="released")
    term = distiller.terms(BATCH)["kd"][1]
    assert term.item() == pytest.approx(value, rel=1e-6)
    roots = [student_of(distiller), *router.gate.parameters()]
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(term, roots, allow_unused=True)
    of_student, of_gate = grads
    assert of_student is not None
    assert of_student.abs().sum().item() == pytest.approx(gradient, rel=1e-6)
    assert of_gate is None  # the authors' gate hears nothing from distillation
    asked = [teacher.asked for teacher in teachers_of(distiller)]
    chosen = [[1], [0], [0], [3], [3]] if k == 1 else None
    assert sum(map(len, asked)) == 5 * k  # only routed teachers run
    if chosen:
        assert asked == [[i for i, best in enumerate(chosen) if j in best] for j in range(4)]


def test_with_all_teachers_the_released_term_is_their_mean(make: Make) -> None:
    distiller, _ = make(k=4, variant="released")
    z = student_of(distiller)
    each = [
        F.kl_div((z / 4).log_softmax(1), (t.z / 4).softmax(1), reduction="batchmean") * 16
        for t in teachers_of(distiller)
    ]
    assert distiller.terms(BATCH)["kd"][1].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-6)


def test_the_papers_gate_learns_from_the_divergences(make: Make) -> None:
    distiller, router = make(FixedGate(), k=2, variant="paper")
    term = distiller.terms(BATCH)["kd"][1]
    g = wave(5, 4, phase=0.7).softmax(1)
    each = torch.stack([divergence(student_of(distiller), t.z) for t in teachers_of(distiller)], 1).detach()
    routed = torch.zeros_like(g).scatter(1, g.topk(2).indices, 1.0)
    assert term.item() == pytest.approx((routed * g * each).sum().item() / 5, rel=1e-6)
    (grad,) = torch.autograd.grad(term, list(router.gate.parameters()))
    pull = routed * each  # of sum_i g_i d_i over the routed, through the softmax of all
    expected = g * (pull - (g * pull).sum(1, keepdim=True)) / 5
    assert torch.allclose(grad, expected, atol=1e-6)


@pytest.mark.parametrize(("variant", "leaks"), [("paper", False), ("released", True)])
def test_the_load_balance_reaches_the_student_in_the_released_code_only(
    make: Make, variant: str, leaks: bool
) -> None:
    distiller, router = make(variant=variant)
    term = distiller.terms(BATCH)["router.balance"][1]
    weights = list(router.gate.parameters())
    grads = torch.autograd.grad(term, [student_of(distiller), *weights], allow_unused=True)
    assert (grads[0] is not None and bool(grads[0].any())) is leaks
    assert all(grad is not None and bool(grad.any()) for grad in grads[1:])


def test_random_routing_chooses_all_alike_and_learns_nothing(make: Make) -> None:
    distiller, router = make(k=1, routing="random")
    counts = torch.zeros(4)
    for step in range(200):
        distiller.run.step = step
        plan = router.plan(BATCH, distiller.student(BATCH))
        assert (plan.sum(1) == 1).all()
        counts += plan.sum(0)
    assert (counts / counts.sum()).tolist() == pytest.approx([0.25] * 4, abs=0.06)  # 1,000 draws: sd 0.014
    assert set(distiller.terms(BATCH)) == {"kd", "task"}


def test_more_teachers_than_there_are_cannot_be_asked(make: Make) -> None:
    with pytest.raises(InputError, match="the run routes among 4 teachers"):
        make(k=5)


# ---- closed forms -----------------------------------------------------------------------------------


def test_two_class_numbers() -> None:
    s, t = torch.tensor([[2.0, 0.0]], requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    value = divergence(s, t)
    value.sum().backward()
    assert value.item() == pytest.approx(0.494877, abs=1e-6)
    assert s.grad is not None
    assert t.grad is not None
    assert s.grad[0].tolist() == pytest.approx([0.4898, -0.4898], abs=1e-4)
    assert t.grad[0].tolist() == pytest.approx([-0.5, 0.5], abs=1e-4)


def test_divergence_is_zero_at_itself_and_blind_to_constants() -> None:
    p, q = wave(6, 5, phase=0.0), wave(6, 5, phase=2.0)
    assert divergence(p, p + 3).abs().max() < 1e-12
    assert torch.allclose(divergence(p + 7, q - 5), divergence(p, q))
    assert (divergence(p, q) > 0).all()
    t = q.clone().requires_grad_()
    assert not mst_loss(p, t).requires_grad  # nothing reaches the teacher


def test_load_balance_numbers() -> None:
    assert load_balance(torch.full((3, 4), 0.25)).item() == pytest.approx(0.0, abs=1e-6)
    assert load_balance(torch.tensor([[0.55, 0.25, 0.1, 0.1]])).item() == pytest.approx(0.0652578, abs=1e-6)
    rows = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]])
    assert load_balance(rows, "CV").item() == pytest.approx(0.848528, abs=1e-6)


def test_the_schedule_steps_down_after_epochs_0_30_60() -> None:
    weight, seen = 1.0, []
    for epoch in range(70):  # the authors' loop
        seen.append(weight)
        weight *= 0.5 if epoch % 30 == 0 else 1
    assert [scheduled(epoch, 0.5, 30) for epoch in range(70)] == pytest.approx(seen)
    assert (seen[0], seen[1], seen[31]) == (1.0, 0.5, 0.25)


def test_the_loss_follows_its_schedule(make: Make) -> None:
    distiller, _ = make(k=4, variant="released")
    first = distiller.terms(BATCH)["kd"][1].item()
    distiller.run.step = 40
    assert distiller.run.epoch == 40
    assert distiller.terms(BATCH)["kd"][1].item() == pytest.approx(first / 4, rel=1e-6)


def test_masks_lie_between_0_and_1_and_are_sized_by_the_factor() -> None:
    net = fitting(wave(2, 24, phase=0.0), heads=3, factor=2, place="here")
    assert net.hidden == 12  # 24 // 6 * 3
    mask = net(wave(2, 24, phase=0.0).float())
    assert mask.shape == (2, 24)
    assert ((mask > 0) & (mask < 1)).all()
    full = fitting(wave(2, 320, phase=0.0), heads=3, factor=2, place="here")
    assert sum(p.numel() for p in full.parameters()) == 16_434_400
    flat = fitting(wave(2, 8, 1, 1, phase=0.0), heads=2, factor=1, place="here")
    assert flat.reduce is None
    assert flat.apply_to(torch.ones(2, 8, 1, 1)).shape == (2, 8, 1, 1)


@pytest.mark.parametrize(("shape", "words"), [((2, 5), "too few"), ((2, 3, 4), r"\[B,d\] or \[B,d,H,W\]")])
def test_features_that_no_mask_fits_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fitting(wave(*shape, phase=0.0), heads=3, factor=2, place="here")


class Line(Student):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.layer, self.key = nn.Linear(4, 3), key

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(logits=self.layer(batch[self.key]))


def test_co_training_is_three_labels_and_six_divergences() -> None:
    """The sum of the authors' stage 1: batch means, T = 4, nothing detached."""
    torch.manual_seed(0)
    members = {"student": Line("x"), "both": Line("x"), "other": Line("input")}
    views: dict[str, dict[str, str]] = {"student": {}, "both": {}, "other": {"input": "y"}}
    group = CoTraining(members, views, Task(TaskTable(), 3), 4.0)
    x, y = wave(5, 4, phase=0.0).float(), wave(5, 4, phase=1.0).float()
    target = torch.arange(5) % 3
    batch = Batch({"id": torch.arange(5), "x": x, "y": y, "target": target})
    terms = group.task_loss(group(batch), batch)
    assert len(terms) == 9
    z = {name: line.layer(y if name == "other" else x) for name, line in members.items()}
    expected = torch.stack([F.cross_entropy(each, target) for each in z.values()]).sum()
    for n in z:
        for m in z:
            if n != m:
                soft = F.kl_div((z[n] / 4).log_softmax(1), (z[m] / 4).softmax(1), reduction="batchmean")
                expected = expected + 16 * soft
    total = torch.stack([term.mean() for term in terms.values()]).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(terms["student-from-both"].sum(), [members["both"].layer.weight])
    assert grad.abs().sum() > 0  # the guide learns too
