"""DHO: the authors' numbers (erjui/DHO, 846de75; PCGrad: branch pcgrad, 103f009) and the paper's claims in closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kd_plugin_dho.loss import PCGrad, dho_loss
from kd_plugin_dho.student import ALPHAS, BETAS, DualHead, mix, search
from torch import Tensor, nn

import kdcore
from kdcore import Batch
from kdcore import recipe as recipes
from kdcore.building import assemble
from kdcore.checkpoint import load_tensors
from kdcore.distill import Distiller
from kdcore.shipping import load_student
from kdcore.stages import StageRun
from kdcore.task import Task

BACKBONE = {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [8]}}
RECIPE: dict[str, Any] = {
    "data": {
        "source": "kd_plugin_dho.data:few_labels",
        "args": {"shots": 2},
        "batch_size": {"labelled": 4, "unlabelled": 8},
        "epoch": "unlabelled",
    },
    "teacher": {"main": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [16]}}},
    "student": {"use": "dho", "backbone": BACKBONE},
    "task": {"stream": "labelled", "weight": 0.5},
    "loss": [{"use": "dho", "weight": 0.5}],
    "train": {"steps": 20, "optimizer": {"use": "AdamW", "lr": 1e-2}},
}
Prepare = Callable[..., tuple[Distiller, Batch]]


def wave(rows: int, columns: int, phase: float) -> Tensor:
    """The fixed tensors that the authors' code was run on."""
    return 2 * torch.sin(
        1.7 * torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) + phase
    )


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """The recipe with overrides, built and set up, and a batch of both streams."""

    def made(*overrides: str) -> tuple[Distiller, Batch]:
        recipe = recipes.check(recipes.read(RECIPE, overrides))
        run = StageRun(recipe, "test", tmp_path)
        distiller, context = run.context(assemble(recipe, run.source, run.builder()))
        return distiller, context.sample

    return made


# ---- the authors' numbers ---------------------------------------------------------------------------


def test_the_step_has_the_authors_value_and_gradients() -> None:
    z_ce, z_kd, z_u = (wave(3, 4, 0.0), wave(3, 4, 1.0), wave(5, 4, 2.0))
    for z in (z_ce, z_kd, z_u):
        z.requires_grad_()
    labelled = dho_loss(z_kd, wave(3, 4, 3.0)).mean()
    unlabelled = dho_loss(z_u, wave(5, 4, 4.0)).mean()
    loss = 0.5 * F.cross_entropy(z_ce, torch.tensor([2, 0, 3])) + 0.5 * (labelled + unlabelled)
    assert labelled.item() == pytest.approx(2.373711585998535, rel=1e-6)
    assert unlabelled.item() == pytest.approx(2.677903175354004, rel=1e-6)
    assert loss.item() == pytest.approx(3.5725698471069336, rel=1e-6)
    loss.backward()
    rows = [
        (
            z_ce,
            [0.018469825387001038, 0.13421836495399475, -0.15558761358261108, 0.0028994157910346985],
            0.8395993709,
        ),
        (
            z_kd,
            [0.07974887639284134, 0.07752949744462967, -0.045552220195531845, -0.11172613501548767],
            0.9127926826,
        ),
        (
            z_u,
            [0.06933347880840302, -0.0026360966730862856, -0.0842408612370491, 0.0175434909760952],
            0.9621677994,
        ),
    ]
    for z, first, total in rows:
        assert z.grad is not None
        assert z.grad[0].tolist() == pytest.approx(first, abs=1e-7)
        assert z.grad.abs().sum().item() == pytest.approx(total, rel=1e-6)


def held_out() -> tuple[Tensor, Tensor, Tensor]:
    z_ce, z_kd = wave(40, 6, 0.3), 1.5 * wave(40, 6, 1.1)
    target = (7 * torch.arange(40)) % 6
    mixture = 0.35 * z_ce.softmax(1) + 0.65 * (z_kd / 2).softmax(1)
    target[:32] = mixture[:32].argmax(1)
    return z_ce, z_kd, target


def test_the_search_is_the_authors() -> None:
    z_ce, z_kd, target = held_out()
    alpha, beta, accuracy = search(z_ce, z_kd, target)
    assert (alpha, beta, accuracy) == pytest.approx((0.5, 1.25, 0.875))
    rules = {(0.4, 0.5): 0.775, (0.5, 1.0): 0.775, (0.0, 2.0): 0.775, (1.0, 1.0): 0.325}
    for (a, b), expected in rules.items():
        right = (mix(z_ce, z_kd, a, b).argmax(1) == target).float().mean()
        assert right.item() == pytest.approx(expected)


def test_pcgrad_is_the_authors_where_gradients_conflict(prepare: Prepare) -> None:
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6]]))
        net.bias.copy_(torch.tensor([0.1, -0.1]))
    out = net(wave(4, 3, 0.5))
    terms = {
        "task": F.cross_entropy(out, torch.tensor([1, 1, 0, 0])),
        "kd": dho_loss(out, 2 * wave(4, 2, 3.0)).mean(),
    }
    params = list(net.parameters())
    grads = {n: [*torch.autograd.grad(v, params, retain_graph=True)] for n, v in terms.items()}
    dot = sum(float((a * b).sum()) for a, b in zip(grads["task"], grads["kd"], strict=True))
    assert dot == pytest.approx(-0.45426511764526367, rel=1e-5)
    weight, bias = _merger(prepare).merge({n: list[Tensor | None](g) for n, g in grads.items()})
    assert weight is not None and bias is not None  # noqa: PT018
    # theirs is the mean of the two projected gradients, ours (as in the PCGrad paper) the sum
    first = torch.tensor([-0.24519255757331848, 0.147671177983284, 0.2071395069360733])
    assert torch.allclose(weight, 2 * torch.stack([first, -first]), atol=1e-6)
    assert torch.allclose(bias, 2 * torch.tensor([0.0510873906314373, -0.05108741670846939]), atol=1e-6)


def _merger(prepare: Prepare) -> PCGrad:
    distiller, _ = prepare("loss.0.use=dho.pcgrad", "student.tied=true")
    loss = distiller.parts.losses[0].loss
    assert isinstance(loss, PCGrad)
    return loss


def test_pcgrad_adds_what_does_not_conflict(prepare: Prepare) -> None:
    grads: dict[str, list[Tensor | None]] = {
        "a": [torch.tensor([1.0, 0.0]), None],
        "b": [torch.tensor([1.0, 1.0]), torch.tensor([3.0])],
    }
    first, second = _merger(prepare).merge(grads)
    assert first is not None and second is not None  # noqa: PT018
    assert first.tolist() == [2.0, 1.0]
    assert second.tolist() == [3.0]


# ---- closed forms -----------------------------------------------------------------------------------


def test_two_class_numbers() -> None:
    assert dho_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])).item() == pytest.approx(0.443777, abs=1e-6)
    z_ce, z_kd = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    assert mix(z_ce, z_kd, 0.4, 0.5).exp().tolist() == pytest.approx([0.303215, 0.696785], abs=1e-6)
    assert mix(z_ce, z_kd, 0.5, 1.0).exp().tolist() == pytest.approx([0.425131, 0.574869], abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-30, 30))
def test_the_divergence_is_zero_exactly_at_equal_distributions(seed: int, shift: float) -> None:
    made = torch.Generator().manual_seed(seed)
    s, t = torch.randn(3, 5, generator=made) * 3, torch.randn(3, 5, generator=made) * 3
    assert (dho_loss(s, t) > 1e-4).all()
    assert torch.allclose(dho_loss(s + shift, t), dho_loss(s, t - shift), atol=1e-3)
    assert dho_loss(t + shift, t).abs().max() < 1e-4


@pytest.mark.parametrize("beta", BETAS)
def test_the_mixture_is_a_distribution_between_the_heads(beta: float) -> None:
    z_ce, z_kd, _ = held_out()
    for alpha in ALPHAS:
        p = mix(z_ce, z_kd, alpha, beta).exp()
        assert torch.allclose(p.sum(1), torch.ones(40), atol=1e-5)
        assert torch.allclose(p, alpha * z_ce.softmax(1) + (1 - alpha) * (z_kd / beta).softmax(1), atol=1e-6)
    assert torch.equal(mix(z_ce, z_kd, 1.0, beta).argmax(1), z_ce.argmax(1))
    assert torch.equal(mix(z_ce, z_kd, 0.0, beta).argmax(1), z_kd.argmax(1))


def test_mixing_logits_would_decide_otherwise() -> None:
    z_ce, z_kd, _ = held_out()
    probabilities = mix(z_ce, z_kd, 0.5, 1.0).argmax(1)
    assert not torch.equal(probabilities, (0.5 * z_ce + 0.5 * z_kd).argmax(1))


def test_the_search_covers_the_grid_and_never_loses_to_a_head() -> None:
    assert len(ALPHAS) == 21 and ALPHAS[-1] == pytest.approx(1.0)  # noqa: PT018
    assert len(BETAS) == 7
    z_ce, z_kd, target = held_out()
    heads = [(z.argmax(1) == target).float().mean().item() for z in (z_ce, z_kd)]
    assert search(z_ce, z_kd, target)[2] >= max(heads)
    assert search(z_ce, z_kd, target) == search(z_ce, z_kd, target)


def test_the_single_heads_optimum_is_the_mixture_of_two_converged_heads() -> None:
    teacher, target = torch.tensor([[0.3, 0.7]]).log(), torch.tensor([0])

    def gradient(p: list[float]) -> Tensor:
        z = torch.tensor([p]).log().requires_grad_()
        loss = 0.5 * F.cross_entropy(z, target) + 0.5 * dho_loss(z, teacher, temperature=1.0).mean()
        (grad,) = torch.autograd.grad(loss, [z])
        return grad

    # convex in the logits, so a point without gradient is the optimum: lambda onehot(y) + (1 - lambda) p_teacher
    assert gradient([0.65, 0.35]).abs().max() < 1e-6
    assert gradient([0.6, 0.4]).abs().max() > 0.01
    labels = torch.tensor([[30.0, -30.0]])  # a label head that converged
    assert mix(labels, teacher, 0.5, 1.0).exp()[0].tolist() == pytest.approx([0.65, 0.35], abs=1e-6)


# ---- the student in a run ---------------------------------------------------------------------------


def test_each_head_learns_from_its_own_term_alone(prepare: Prepare) -> None:
    distiller, batch = prepare()
    student = distiller.student
    assert isinstance(student, DualHead)
    terms = distiller.terms(batch)
    heads = {"task": student.ce_head, "dho": student.kd_head}
    for name, (_, value) in terms.items():
        for owner, head in heads.items():
            grads = torch.autograd.grad(value, list(head.parameters()), retain_graph=True, allow_unused=True)
            assert all((grad is not None) == (owner == name) for grad in grads)
        (shared,) = torch.autograd.grad(value, [next(student.backbone.parameters())], retain_graph=True)
        assert shared.abs().sum() > 0  # the backbone learns from both
    assert all(p.grad is None for p in distiller.teachers["main"].parameters())


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_variants_weigh_the_streams_as_they_say(prepare: Prepare, variant: str) -> None:
    distiller, batch = prepare(f"loss.0.variant={variant}")
    batch = Batch(
        parts={
            "labelled": batch.part("labelled").rows(torch.arange(2)),
            "unlabelled": batch.part("unlabelled"),
        }
    )
    sums, sizes = [], []
    for stream in batch.streams:
        part = batch.part(stream)
        s, t = distiller.student(part)["z_kd"], distiller.teachers["main"](part).logits
        sums.append(F.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="sum").item() * 4)
        sizes.append(len(part))
    union, means = sum(sums) / sum(sizes), sum(a / b for a, b in zip(sums, sizes, strict=True))
    expected = union if variant == "paper" else means
    assert sizes == [2, 4]
    assert distiller.terms(batch)["dho"][1].item() == pytest.approx(expected, rel=1e-4)


def test_tied_heads_are_the_single_head_baseline_step_for_step(prepare: Prepare) -> None:
    distiller, batch = prepare(
        "student.tied=true", "loss.0.variant=released", "task.weight=0.3", "loss.0.weight=0.7"
    )
    student = distiller.student
    assert isinstance(student, DualHead)
    names = {n: p.detach().clone() for n, p in student.named_parameters()}
    assert len(names) == 4  # one hidden layer, one head
    w1, b1, w2, b2 = (p.requires_grad_() for p in names.values())
    single = [w1, b1, w2, b2]
    ours = torch.optim.AdamW(student.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(single, lr=1e-2)
    teacher = distiller.teachers["main"]
    for _ in range(5):
        ours.zero_grad()
        distiller(batch).backward()
        ours.step()
        loss = torch.zeros(())
        for part in batch.parts.values():
            logits = F.relu(part["input"] @ w1.T + b1) @ w2.T + b2
            with torch.no_grad():
                t = teacher(part).logits
            loss = loss + 0.7 * 4 * F.kl_div(
                (logits / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean"
            )
            if "target" in part:
                loss = loss + 0.3 * F.cross_entropy(logits, part["target"])
        theirs.zero_grad()
        loss.backward()
        theirs.step()
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(student.parameters(), single, strict=True))


def test_a_run_tunes_on_tune_and_ships_the_rule(tmp_path: Path) -> None:
    result = kdcore.run(RECIPE, out=tmp_path / "run")
    student, run = load_student(tmp_path / "run")
    assert isinstance(student, DualHead)
    weights = load_tensors(result.student, "test")
    with torch.no_grad():
        said = [(student(b), b["target"]) for b in run.source.loader("tune")]
        z_ce, z_kd = (torch.cat([o[n] for o, _ in said]) for n in ("logits", "z_kd"))
    alpha, beta, accuracy = search(z_ce, z_kd, torch.cat([t for _, t in said]))
    assert (float(weights["alpha"]), float(weights["beta"])) == pytest.approx((alpha, beta))
    task = Task(run.recipe.task, run.source.data.classes)
    assert run.evaluate(student, task, "tune")["accuracy"] == pytest.approx(accuracy, abs=1e-6)

    batch = next(iter(run.source.loader("val")))
    graph = torch.export.export(student.deploy().eval(), tuple(student.inputs(batch).values()))
    with torch.no_grad():
        exported = graph.module()(*student.inputs(batch).values())["logits"]
        outputs = student(batch)
    p = alpha * outputs["logits"].softmax(1) + (1 - alpha) * (outputs["z_kd"] / beta).softmax(1)
    assert torch.allclose(exported.exp(), p, atol=1e-6)
    linears = [n for n in graph.graph.nodes if "linear" in str(n.target)]
    assert len(linears) == 3  # the backbone's layer once, and two heads
