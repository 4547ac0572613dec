"""DHKD: the authors' numbers (penghui-yang/DHKD, 7976c69d), closed forms, and what the second head is for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kd_plugin_dhkd.demo import cosines, share_in_conflict
from kd_plugin_dhkd.loss import DHKD, align, auxiliary_head, binary_kl, binary_kl_norm
from kd_plugin_dhkd.oracle import ORACLES
from torch import Tensor, nn

import kdcore
from kdcore import InputError, Outputs
from kdcore import recipe as recipes
from kdcore.building import assemble
from kdcore.checkpoint import load_tensors
from kdcore.distill import Distiller
from kdcore.optimizers import trainable
from kdcore.shipping import load_student
from kdcore.stages import StageRun
from kdcore.testing import Oracle, check_oracle
from kdcore.types import Batch

NET = {"use": "module", "model": "kdcore.zoo:mlp"}
RECIPE: dict[str, Any] = {
    "data": {"source": "kdcore.datasets:digits", "args": {"labels": 64}, "batch_size": 16},
    "teacher": {"main": {**NET, "args": {"hidden": [16]}}},
    "student": {**NET, "args": {"hidden": [8]}},
    "loss": [{"use": "dhkd", "reads": {"student": {"feature": "head.in"}}}],
    "train": {"steps": 6, "optimizer": {"use": "SGD", "lr": 0.05, "momentum": 0.9}},
}
Prepare = Callable[..., tuple[Distiller, Batch]]


def pair(seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    z, t = (scale * torch.randn(5, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), t


def wave(*shape: int, phase: float) -> Tensor:
    """The fixed tensors that the authors' optimiser was run on."""
    n = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return torch.sin(1.7 * n + phase).reshape(shape)


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """The recipe with overrides, built and set up, and a small batch."""

    def made(*overrides: str) -> tuple[Distiller, Batch]:
        recipe = recipes.check(recipes.read(RECIPE, overrides))
        run = StageRun(recipe, "test", tmp_path)
        distiller, context = run.context(assemble(recipe, run.source, run.builder()))
        return distiller, context.sample

    return made


# ---- the divergences --------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


@pytest.mark.parametrize("tau", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_norm_is_a_log_cosh_regression(seed: int, tau: float) -> None:
    z, t = pair(seed)
    loss = binary_kl_norm(z, t, temperature=tau)
    (grad,) = torch.autograd.grad(loss.sum(), [z])
    torch.testing.assert_close(
        loss, tau**2 * ((z - t) / (2 * tau)).cosh().log().sum(-1), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(grad, tau / 2 * ((z - t) / (2 * tau)).tanh(), rtol=1e-10, atol=1e-12)
    assert grad.abs().max() <= tau / 2


def test_a_high_temperature_is_a_squared_error_and_a_wide_gap_an_absolute_one() -> None:
    z, t = pair(0)
    torch.testing.assert_close(
        binary_kl_norm(z, t, temperature=1e3), (z - t).square().sum(-1) / 8, rtol=1e-4, atol=0
    )
    gap = torch.tensor([[60.0]], dtype=torch.float64)
    expected = 2.0 * 60 / 2 - 4 * np.log(2)  # tau |z - t| / 2 - tau^2 log 2
    assert binary_kl_norm(gap, 0 * gap, temperature=2.0).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("loss", [binary_kl, binary_kl_norm])
def test_zero_and_flat_exactly_where_student_equals_teacher(loss: Callable[..., Tensor]) -> None:
    z, t = pair(1)
    at = t.clone().requires_grad_()
    value = loss(at, t)
    (grad,) = torch.autograd.grad(value.sum(), [at])
    assert value.abs().max() < 1e-14
    assert grad.abs().max() < 1e-14
    assert (loss(z, t) > 0.1).all()
    # a constant added to the student's logits is not forgotten, as softmax would
    assert (loss(t + 1, t) > 0.1).all()


def test_norm_is_symmetric_and_binary_kl_is_not() -> None:
    z, t = pair(2)
    torch.testing.assert_close(binary_kl_norm(z, t), binary_kl_norm(t, z))
    assert not torch.allclose(binary_kl(z, t), binary_kl(t, z))


@pytest.mark.parametrize("loss", [binary_kl, binary_kl_norm])
@pytest.mark.parametrize(("z", "value", "slope"), [(40.0, torch.inf, torch.nan), (-60.0, 34.0687713623, 0.0)])
def test_the_released_clamp_fails_where_the_exact_form_holds(
    loss: Callable[..., Tensor], z: float, value: float, slope: float
) -> None:
    """Numbers of the authors' code in float32; the exact gradient is that of tau |z| / 2: 1 in size."""
    released, exact = (torch.tensor([[z, 0.0]], requires_grad=True) for _ in range(2))
    theirs, mine = loss(released, torch.zeros(1, 2), variant="released"), loss(exact, torch.zeros(1, 2))
    theirs.sum().backward()
    mine.sum().backward()
    assert released.grad is not None
    assert exact.grad is not None
    assert theirs.item() == pytest.approx(value)
    assert released.grad[0, 0].item() == pytest.approx(slope, nan_ok=True)
    assert mine.item() == pytest.approx(abs(z) - 4 * np.log(2), rel=1e-6)
    assert exact.grad[0, 0].item() == pytest.approx(np.sign(z), abs=1e-6)


@pytest.mark.parametrize("loss", [binary_kl, binary_kl_norm])
def test_no_gradient_to_the_teacher_and_float32_inside(loss: Callable[..., Tensor]) -> None:
    z, t = pair(3)
    t.requires_grad_()
    loss(z, t).sum().backward()
    assert t.grad is None
    half = loss(z.detach().half(), t.detach().half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), loss(z, t), rtol=1e-2, atol=1e-2)


# ---- gradient alignment -----------------------------------------------------------------------------


AUTHORS: dict[float, tuple[float, list[list[list[float]]]]] = {  # phase of g': dot, gradients of W, g, g'
    0.0: (
        0.34814757289266257,
        [
            [[-0.9150448739, -0.04665280828], [-0.1922534559, -0.1234694878], [0.9645864725, 0.07846953573]],
            [
                [-0.1022463429, 0.1905680885, -0.2662354242],
                [-0.0643308276, 0.06044293562, -0.05254141422],
                [0.1665771705, -0.2510110241, 0.3187768384],
            ],
            [
                [-0.08394163834, 0.1095582463, -0.1278997906],
                [0.02602787711, -0.06253076038, 0.09488137513],
                [0.07331486223, -0.09694892265, 0.1141452241],
            ],
        ],
    ),
    2.5: (
        -0.04735637740344686,
        [
            [[-0.6622561838, -0.03497437614], [-0.1951387485, -0.02440361629], [0.7125412906, 0.04126291934]],
            [
                [-0.105943846, 0.1974595439, -0.2758632143],
                [-0.06665720361, 0.06262871498, -0.05444145328],
                [0.1726010496, -0.2600882589, 0.3303046676],
            ],
            [
                [0.004589995219, -0.01395761986, 0.02239840809],
                [0.0195511369, -0.03136584491, 0.04109774745],
                [-0.02379139152, 0.05409042363, -0.08079765609],
            ],
        ],
    ),
}


@pytest.mark.parametrize("phase", AUTHORS)
def test_alignment_is_the_authors(phase: float) -> None:
    """OptimGradAlign.ga_backward on a linear network with two heads: first no conflict, then one."""
    backbone, g, aux = (
        wave(*shape, phase=p).requires_grad_() for shape, p in (((3, 2), 0.3), ((3, 3), 1.0), ((3, 3), phase))
    )
    h = wave(5, 2, phase=0.9) @ backbone.T
    ce = F.cross_entropy(h @ g.T, torch.tensor([0, 2, 1, 1, 0]))
    kd = binary_kl_norm(h @ aux.T, 3 * wave(5, 3, phase=2.0)).mean()
    g_ce, g_kd = (
        torch.autograd.grad(term, [backbone, g, aux], retain_graph=True, allow_unused=True)
        for term in (ce, kd)
    )
    dot, expected = AUTHORS[phase]
    assert g_ce[0] is not None
    assert g_kd[0] is not None
    assert float((g_ce[0] * g_kd[0]).sum()) == pytest.approx(dot)
    kept = [None if each is None else each.clone() for each in g_ce]
    for want, one, two in zip(expected, g_ce, align(g_kd, g_ce), strict=True):
        merged = torch.stack([x for x in (one, two) if x is not None]).sum(0)
        torch.testing.assert_close(merged, torch.tensor(want, dtype=torch.float64), rtol=1e-7, atol=1e-9)
    assert all(a is b or torch.equal(a, b) for a, b in zip(g_ce, kept, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_alignment_never_slows_cross_entropy_and_leaves_peace_alone(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    g_ce, g_kd = (torch.randn(20, generator=rng) for _ in range(2))
    (aligned,) = align([g_kd], [g_ce])
    assert aligned is not None
    if g_ce @ g_kd < 0:
        assert (g_ce @ aligned).abs() < 1e-5
    else:
        assert torch.equal(aligned, g_kd)
    assert g_ce @ (g_ce + aligned) >= g_ce @ g_ce - 1e-4


def test_alignment_without_anything_in_common_changes_nothing() -> None:
    apart = align([None, torch.ones(2)], [torch.ones(3), None])
    assert apart[0] is None
    assert torch.equal(apart[1], torch.ones(2))  # type: ignore[arg-type]
    assert torch.equal(align([torch.ones(2)], [torch.zeros(2)])[0], torch.ones(2))  # type: ignore[arg-type]


# ---- in a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "nonlinear"])
def test_each_head_learns_from_its_own_term_alone(prepare: Prepare, head: str) -> None:
    distiller, batch = prepare(f"loss.0.head={head}")
    loss, student = distiller.parts.losses[0].loss, distiller.student
    assert isinstance(loss, DHKD)
    heads = {"task": student.model.get_submodule("head"), "dhkd": loss.auxiliary}
    for name, (_, value) in distiller.terms(batch).items():
        for owner, module in heads.items():
            grads = torch.autograd.grad(
                value, list(module.parameters()), retain_graph=True, allow_unused=True
            )
            assert all((grad is not None) == (owner == name) for grad in grads)
        (shared,) = torch.autograd.grad(value, [next(student.parameters())], retain_graph=True)
        assert shared.abs().sum() > 0
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in trainable(distiller.parts)}


def test_the_nonlinear_head_is_the_authors() -> None:
    """models/classifier.py: Linear 200, dropout 0.1, batch norm, ReLU, Linear; it couples the batch."""
    layers = list(auxiliary_head(7, 5, "nonlinear").children())
    assert [type(layer).__name__ for layer in layers] == [
        "Linear",
        "Dropout",
        "BatchNorm1d",
        "ReLU",
        "Linear",
    ]
    shapes = [tuple(p.shape) for p in nn.Sequential(*layers).parameters()]
    assert shapes == [(200, 7), (200,), (200,), (200,), (5, 200), (5,)]
    assert isinstance(layers[1], nn.Dropout)
    assert layers[1].p == 0.1
    assert (DHKD(head="nonlinear").couples_batch, DHKD().couples_batch) == (True, False)


def test_one_head_trains_the_classifier_itself(prepare: Prepare) -> None:
    distiller, batch = prepare("loss.0.head=none", "loss.0.reads.student.feature=head")
    student, teacher = distiller.student(batch), distiller.teachers["main"](batch)
    expected = binary_kl_norm(student["logits"], teacher["logits"]).mean()
    torch.testing.assert_close(distiller.terms(batch)["dhkd"][1], expected)
    assert not list(distiller.parts.losses[0].loss.parameters())


def test_alignment_in_a_step_is_that_of_its_two_gradients(prepare: Prepare) -> None:
    distiller, batch = prepare("loss.0.align=true", "loss.0.weight=3.0")
    loss = distiller.parts.losses[0].loss
    assert isinstance(loss, DHKD)
    params = [p for p in distiller.student.parameters() if p.requires_grad]
    g: dict[str, list[Tensor | None]] = {
        name: list(torch.autograd.grad(weight * value, params, retain_graph=True, allow_unused=True))
        for name, (weight, value) in distiller.terms(batch).items()
    }
    g["dhkd"] = [None if each is None else -each for each in g["task"]]  # against all of it: nothing is left
    for merged, task in zip(loss.merge(g), g["task"], strict=True):
        torch.testing.assert_close(merged, task)
    alone: dict[str, list[Tensor | None]] = {"dhkd": [torch.ones(2)], "other": [torch.ones(2)]}
    (added,) = loss.merge(alone)  # no task: they are added
    assert added is not None
    assert added.tolist() == [2.0, 2.0]
    assert not hasattr(DHKD(), "merge")


def test_weight_zero_is_cross_entropy_alone(tmp_path: Path) -> None:
    """The second head draws no random number that the student's training depends on."""
    plain = {key: value for key, value in RECIPE.items() if key not in ("loss", "teacher")}
    one = kdcore.run(plain, out=tmp_path / "plain")
    two = kdcore.run(RECIPE, out=tmp_path / "zero", overrides=["loss.0.weight=0"])
    mine, theirs = (load_tensors(result.student, "test") for result in (two, one))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    full = load_tensors(kdcore.run(RECIPE, out=tmp_path / "full").student, "test")
    assert not torch.equal(full["hidden0.0.weight"], mine["hidden0.0.weight"])


@pytest.mark.parametrize("align", ["true", "false"])
def test_what_is_shipped_is_the_student_alone(tmp_path: Path, align: str) -> None:
    result = kdcore.run(
        RECIPE, out=tmp_path / "run", overrides=["loss.0.head=nonlinear", f"loss.0.align={align}"]
    )
    weights = load_tensors(result.student, "test")
    assert {name.partition(".")[0] for name in weights} == {"hidden0", "head"}
    student, run = load_student(tmp_path / "run")
    batch = next(iter(run.source.loader("val")))
    shipped = student.deploy().eval()
    torch.testing.assert_close(shipped(*student.inputs(batch).values())["logits"], student(batch)["logits"])
    assert len(list(shipped.parameters())) == 4
    terms = [
        t["term"]
        for t in json.loads((tmp_path / "run" / "results.json").read_text())["student"]["guards"]["terms"]
    ]
    assert sorted(terms) == ["dhkd", "task"]


def test_what_cannot_be_is_said(prepare: Prepare) -> None:
    with pytest.raises(InputError, match="head"):
        prepare("loss.0.head=bilinear")
    with pytest.raises(InputError, match="out of range"):
        prepare("loss.0.temperature=0")


def test_a_feature_map_is_flattened() -> None:
    loss = DHKD(head="none")
    z, t = torch.randn(2, 3, 1, 1), torch.randn(2, 3)
    value = loss(Outputs(tensors={"feature": z}), Outputs(logits=t), Batch())
    torch.testing.assert_close(value, binary_kl_norm(z.flatten(1), t))


# ---- the theory -------------------------------------------------------------------------------------


def test_gradients_conflict_at_the_head_and_not_at_the_feature() -> None:
    found = cosines(seed=0, epochs=8)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, 8 * 63)
    assert share_in_conflict(found["head"]) > 0.02
    assert share_in_conflict(found["feature"]) < 0.005
    assert all(-1 <= value <= 1 for value in itertools.chain(*found.values()))
