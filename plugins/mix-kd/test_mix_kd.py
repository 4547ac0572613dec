"""MIX-KD: the authors' numbers (hchoi71/MIX-KD, 6e8c149b), the invariances of rescaled logits, and the mixing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kd_plugin_mix_kd.demo import accuracy, fgsm, noise, predict
from kd_plugin_mix_kd.loss import FLOOR, mix_kd_loss, rescale
from kd_plugin_mix_kd.mixup import PartialMixup, Variant, draw_pairs, mix, soft_labels
from kd_plugin_mix_kd.oracle import ORACLES, certain
from kd_plugin_mix_kd.student import Rescaled
from torch import Tensor

import kdcore
from kdcore import Batch, InputError
from kdcore import recipe as recipes
from kdcore.building import assemble
from kdcore.checkpoint import load_tensors
from kdcore.distill import Distiller
from kdcore.shipping import load_student
from kdcore.stages import StageRun
from kdcore.testing import Oracle, check_oracle

NET = {"use": "module", "model": "kdcore.zoo:mlp"}
RECIPE: dict[str, Any] = {
    "data": {"source": "kdcore.datasets:digits", "args": {"labels": 40, "flat": True}, "batch_size": 20},
    "teacher": {"main": {**NET, "args": {"hidden": [16]}}},
    "student": {"use": "mix-kd", "backbone": {**NET, "args": {"hidden": [8]}}},
    "augmentation": [{"use": "mix-kd"}],
    "loss": [{"use": "mix-kd"}],
    "train": {"steps": 4, "optimizer": {"use": "AdamW", "lr": 1e-2}},
}
Prepare = Callable[..., tuple[Distiller, Batch]]


def sample(seed: int, rows: int = 6, classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(rows, classes, generator=rng, dtype=torch.float64) for _ in range(2))
    return s, t, torch.rand(rows, classes, generator=rng, dtype=torch.float64).softmax(1)


def total(loss: dict[str, Tensor]) -> Tensor:
    return loss["cls"] + loss["kd"]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """The recipe with overrides, built and set up, and a small batch."""

    def made(*overrides: str) -> tuple[Distiller, Batch]:
        recipe = recipes.check(recipes.read(RECIPE, overrides))
        run = StageRun(recipe, "test", tmp_path)
        distiller, _ = run.context(assemble(recipe, run.source, run.builder()))
        return distiller, next(iter(run.source.loader("train"))).rows(torch.arange(20))

    return made


# ---- the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Oracle) -> None:
    check_oracle(oracle)


@pytest.mark.parametrize("seed", range(3))
def test_scale_and_level_of_the_logits_do_not_count(seed: int) -> None:
    s, t, y = sample(seed)
    for same in (mix_kd_loss(7 * s - 2, t, y), mix_kd_loss(s, 0.3 * t + 5, y)):
        torch.testing.assert_close(total(same), total(mix_kd_loss(s, t, y)), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(total(mix_kd_loss(-s, t, y)), total(mix_kd_loss(s, t, y)))


@pytest.mark.parametrize("seed", range(3))
def test_so_the_gradient_is_orthogonal_to_the_constant_and_to_the_logits(seed: int) -> None:
    """The standard deviation is in the graph: a detached one would leave a part along the logits."""
    s, t, y = sample(seed)
    s.requires_grad_(), t.requires_grad_()
    total(mix_kd_loss(s, t, y)).sum().backward()
    assert t.grad is None
    assert s.grad is not None
    centred = s.detach() - s.detach().mean(1, keepdim=True)
    assert s.grad.sum(1).abs().max() < 1e-12
    assert (s.grad * centred).sum(1).abs().max() < 1e-12
    assert s.grad.abs().max() > 1e-3


def test_the_divergence_is_zero_where_the_rescaled_vectors_agree() -> None:
    s, t, y = sample(0)
    assert mix_kd_loss(2 * t + 1, t, y)["kd"].abs().max() < 1e-12
    assert (mix_kd_loss(s, t, y)["kd"] > 1e-3).all()


@pytest.mark.parametrize(("classes", "floor"), [(2, 0.21762), (3, 0.30295), (10, 0.32278), (100, 0.00448)])
def test_no_student_is_surer_than_the_floor(classes: int, floor: float) -> None:
    s = torch.zeros(1, classes, dtype=torch.float64)
    s[0, 0] = 1e4
    cls = mix_kd_loss(s, s, torch.tensor([0]), gamma=1.0)["cls"].item()
    assert cls == pytest.approx(floor, abs=5e-6) == pytest.approx(certain(classes), abs=5e-6)
    rng = torch.Generator().manual_seed(classes)
    others = 5 * torch.randn(200, classes, generator=rng, dtype=torch.float64)
    assert (mix_kd_loss(others, others, others.argmax(1), gamma=1.0)["cls"] >= cls - 1e-9).all()


def test_two_classes_carry_no_dark_knowledge() -> None:
    s, t = torch.tensor([[0.1, 0.0], [3.0, 0.0]]), torch.tensor([[9.0, 0.0], [0.0, 1.0]])
    kd = mix_kd_loss(s, t, torch.tensor([0, 0]), alpha=1.0)["kd"]
    assert kd[0].abs() < 1e-6  # both prefer the first class, however surely
    assert kd[1] > 0.5


def test_hard_labels_are_their_one_hot_and_negative_ones_are_ignored() -> None:
    s, t, _ = sample(1)
    y = torch.tensor([3, 0, 9, 1, 1, 7])
    torch.testing.assert_close(
        total(mix_kd_loss(s, t, y)), total(mix_kd_loss(s, t, F.one_hot(y, 10).double()))
    )
    y[2] = -100
    assert mix_kd_loss(s, t, y)["cls"][2] == 0


def test_constant_logits_stay_finite_and_one_class_is_refused() -> None:
    s = torch.zeros(2, 5, requires_grad=True)
    total(mix_kd_loss(s, torch.ones(2, 5), torch.tensor([0, 1]))).sum().backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    almost = torch.tensor([[0.0, FLOOR / 10]])
    assert rescale(almost).std() < 1  # below the floor the vector is left small
    with pytest.raises(ValueError, match="one class"):
        rescale(torch.zeros(2, 1))


def test_low_precision_is_computed_in_float32() -> None:
    s, t, y = (x.half() for x in sample(2))
    found = total(mix_kd_loss(s, t, y))
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), total(mix_kd_loss(s.double(), t.double(), y.double())), rtol=1e-4, atol=1e-5
    )


# ---- the mixing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(
    ("count", "unmixed", "released"), [(64, 0.9, 0.39791667), (64, 0.5, 0.59385417), (8, 0.9, 0.35)]
)
def test_mixed_share(variant: Variant, count: int, unmixed: float, released: float) -> None:
    """``paper`` mixes exactly the share that it says, up to rounding. The released numbers are the share of mixed
    labels in 300 calls of the authors' PMU, which counts no pair of two equal images; in closed form (1 - 1/B)^int(pB)."""
    rng = np.random.default_rng(0)
    shares = [
        (draw_pairs(count, rng, unmixed=unmixed, variant=variant)[2] < 1).double().mean().item()
        for _ in range(2000)
    ]
    chosen = int(unmixed * count)
    if variant == "paper":
        assert set(shares) == {(count - chosen) / count}
        return
    closed = (1 - 1 / count) ** chosen
    assert np.mean(shares) == pytest.approx(closed, abs=0.01)
    assert np.mean(shares) * (1 - 1 / count) == pytest.approx(released, abs=0.02)


def test_every_image_is_once_a_first_and_once_a_second_partner() -> None:
    first, second, lam = draw_pairs(20, np.random.default_rng(1), unmixed=0.0)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert not torch.equal(first, second)
    assert ((lam > 0) & (lam < 1)).all()  # one a sample, all of them mixed: full mixup
    assert len(set(lam.tolist())) == 20
    again = draw_pairs(20, np.random.default_rng(1), unmixed=0.0)
    assert all(torch.equal(a, b) for a, b in zip((first, second, lam), again, strict=True))


@pytest.mark.parametrize("beta", [0.2, 1.0, 4.0])
def test_coefficients_are_beta_distributed(beta: float) -> None:
    lam = torch.cat(
        [draw_pairs(100, np.random.default_rng(i), unmixed=0.0, beta=beta)[2] for i in range(200)]
    )
    assert lam.mean().item() == pytest.approx(0.5, abs=0.01)
    assert lam.var().item() == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.05)


def test_mix_is_the_formula_and_leaves_the_unmixed_bit_for_bit() -> None:
    x = torch.randn(3, 2, 2)
    first, second, lam = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0]), torch.tensor([1.0, 0.25, 0.0])
    mixed = mix(x, first, second, lam)
    assert torch.equal(mixed[0], x[2])
    torch.testing.assert_close(mixed[1], 0.25 * x[0] + 0.75 * x[1])
    assert torch.equal(mixed[2], x[0])
    labels = mix(soft_labels(torch.tensor([0, 2, 2]), 4), first, second, lam)
    expected = [[0.0, 0.0, 1.0, 0.0], [0.25, 0.0, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert labels.tolist() == expected


# ---- in a run ---------------------------------------------------------------------------------------


def test_a_batch_is_mixed_and_the_teacher_sees_it_mixed(prepare: Prepare) -> None:
    distiller, batch = prepare("augmentation.0.unmixed=0.5")
    augmentation = distiller.parts.augmentations["mix-kd"]
    mixed = augmentation(batch)
    assert mixed["target"].shape == (20, 10)
    torch.testing.assert_close(mixed["target"].sum(1), torch.ones(20))
    same = (mixed["input"] == batch["input"][_places(batch, mixed)]).all(1)
    assert same.sum() >= 10  # the first image of each pair, whose id is the sample's
    assert same.sum() < 20
    assert torch.equal(augmentation(batch)["input"], mixed["input"])  # a function of the seed and the step
    distiller.run.step = 1
    assert not torch.equal(augmentation(batch)["input"], mixed["input"])
    terms = distiller.terms(mixed)
    assert sorted(terms) == ["mix-kd.cls", "mix-kd.kd"]  # the task's own term is inside
    s, t = distiller.student.model(mixed["input"]), distiller.teachers["main"](mixed).logits
    torch.testing.assert_close(terms["mix-kd.kd"][1], mix_kd_loss(s, t, mixed["target"])["kd"].mean())


def _places(batch: Batch, mixed: Batch) -> Tensor:
    where = {int(i): place for place, i in enumerate(batch["id"])}
    return torch.tensor([where[int(i)] for i in mixed["id"]])


def test_streams_are_mixed_apart_and_unlabelled_ones_in_their_inputs(prepare: Prepare) -> None:
    distiller, batch = prepare()
    augmentation = distiller.parts.augmentations["mix-kd"]
    unlabelled = Batch({key: value for key, value in batch.items() if key != "target"})
    mixed = augmentation(Batch(parts={"labelled": batch, "unlabelled": unlabelled}))
    assert "target" not in mixed.part("unlabelled")
    assert mixed.part("labelled")["target"].shape == (20, 10)
    assert not torch.equal(mixed.part("labelled")["id"], mixed.part("unlabelled")["id"])


def test_what_cannot_be_mixed_is_said(prepare: Prepare) -> None:
    distiller, batch = prepare()
    tokens = Batch({**batch, "input": batch["target"]})
    with pytest.raises(InputError, match="only floating inputs"):
        distiller.parts.augmentations["mix-kd"](tokens)
    augmentation = PartialMixup()
    distiller.run.source.data.classes = None
    augmentation.run = distiller.run
    with pytest.raises(InputError, match="number of classes"):
        augmentation.setup()


def test_none_mixed_trains_as_without_mixup(tmp_path: Path) -> None:
    """Only the order of the samples in a batch differs, hence the tolerance."""
    plain = {key: value for key, value in RECIPE.items() if key != "augmentation"}
    one = kdcore.run(plain, out=tmp_path / "plain")
    two = kdcore.run(RECIPE, out=tmp_path / "none", overrides=["augmentation.0.unmixed=1.0"])
    full = kdcore.run(RECIPE, out=tmp_path / "full", overrides=["augmentation.0.unmixed=0.0"])
    a, b, c = (load_tensors(each.student, "test") for each in (one, two, full))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    assert not all(torch.allclose(a[name], c[name], atol=1e-3) for name in a)


def test_plain_distillation_takes_soft_labels(tmp_path: Path) -> None:
    result = kdcore.run(RECIPE, out=tmp_path / "run", overrides=["loss.0.use=kd"])
    terms = json.loads((result.folder / "results.json").read_text())["student"]["guards"]["terms"]
    assert sorted(term["term"] for term in terms) == ["kd", "task"]


def test_the_student_is_judged_and_shipped_rescaled(tmp_path: Path) -> None:
    kdcore.run(RECIPE, out=tmp_path / "run")
    student, run = load_student(tmp_path / "run")
    assert isinstance(student, Rescaled)
    batch = next(iter(run.source.loader("val")))
    raw, shipped = (
        student(batch)["logits"],
        student.deploy().eval()(*student.inputs(batch).values())["logits"],
    )
    torch.testing.assert_close(shipped, raw / raw.std(1, keepdim=True))
    torch.testing.assert_close(shipped.std(1), torch.ones(len(raw)))
    assert torch.equal(shipped.argmax(1), raw.argmax(1))
    none = accuracy(tmp_path / "run", lambda student, images, target: images)
    tested = json.loads((tmp_path / "run" / "results.json").read_text())["test"]["student"]["accuracy"]
    assert none == pytest.approx(tested)


def test_the_disturbances_are_what_they_say(prepare: Prepare) -> None:
    distiller, batch = prepare()
    student, images, target = distiller.student.eval(), batch["input"], batch["target"]
    noisy = noise(student, images, target) - images
    assert noisy.std().item() == pytest.approx(0.25, rel=0.05)
    attacked = fgsm(student, images, target)
    assert ((attacked - images).abs() < 0.1 + 1e-5).all()
    before, after = (F.cross_entropy(predict(student, x), target) for x in (images, attacked))
    assert after > before + 0.05  # against the student, not with it


def test_micro_batches_share_one_mixing(tmp_path: Path) -> None:
    """The whole update is mixed before it is cut, and no term couples the batch."""
    whole = kdcore.run(RECIPE, out=tmp_path / "whole")
    parts = kdcore.run(RECIPE, out=tmp_path / "parts", overrides=["train.accumulate=3"])
    a, b = (load_tensors(each.student, "test") for each in (whole, parts))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
