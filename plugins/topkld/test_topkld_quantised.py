"""Quantiser, student and probes: torch's own fake quantisation, closed forms, and short runs of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kd_plugin_topkld.loss import CAKLD
from kd_plugin_topkld.probes import frechet, sampled
from kd_plugin_topkld.quantiser import FakeQuantise, Scheme, model_bits, quantise
from kd_plugin_topkld.student import Quantised
from kd_plugin_topkld.tokens import digit_tokens, token_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kdcore
from kdcore import Batch, InputError, Outputs, Student
from kdcore.checkpoint import load_tensors
from kdcore.shipping import load_student

SHORT = ["train.epochs=1", "teacher.main.train.epochs=1", "data.batch_size=512", "probe=[]"]


def run(folder: Path, *overrides: str, **kwargs: Any) -> Any:
    return kdcore.run("topkld:digits", out=folder, overrides=[*SHORT, *overrides], **kwargs)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the quantiser ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_is_torchs_fake_quantisation_with_its_gradient(bits: int) -> None:
    w, most = weights(6, 20), 2 ** (bits - 1) - 1
    scale, zero = w.abs().amax(1) / most, torch.zeros(6, dtype=torch.int32)
    layer = nn.Linear(20, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    parametrize.register_parametrization(layer, "weight", FakeQuantise(bits))
    theirs = w.clone().requires_grad_()
    said = torch.fake_quantize_per_channel_affine(theirs, scale, zero, 0, -most, most)
    assert torch.allclose(layer.weight, said, atol=1e-6)
    pull = weights(6, 20, seed=1)
    (layer.weight * pull).sum().backward()
    (said * pull).sum().backward()
    assert theirs.grad is not None
    master = layer.parametrizations.weight.original  # type: ignore[union-attr]
    assert torch.equal(master, w)  # type: ignore[arg-type]
    assert torch.allclose(master.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 5), (4, None), (8, 10)])
def test_levels_distance_and_idempotence(bits: int, group: int | None, scheme: Scheme) -> None:
    w = weights(7, 20).double()
    q = quantise(w, bits, scheme, group)
    rows, before = (x.reshape(-1, group or 20) for x in (q, w))
    levels = 2**bits - (scheme == "symmetric")
    span = 2 * before.abs().amax(1) if scheme == "symmetric" else before.amax(1) - before.amin(1)
    scale = span / (levels - 1)
    assert all(len(row.mul(1e9).round().unique()) <= levels for row in rows)
    assert ((rows - before).abs() <= scale[:, None] / 2 + 1e-12).all()
    assert torch.allclose(quantise(q, bits, scheme, group), q, atol=1e-12)


def test_two_bits_by_hand() -> None:
    w = torch.tensor([[0.9, -0.2, -0.5, 0.4], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(quantise(w, 2), torch.tensor([[0.9, 0.0, -0.9, 0.0], [0.0] * 4]))
    levels = torch.tensor([-0.5, -0.5 + 1.4 / 3, -0.5 + 2.8 / 3, 0.9])
    assert torch.allclose(quantise(w, 2, "asymmetric")[0], levels[[3, 1, 0, 2]])


def test_gradient_is_the_plain_one_at_the_quantised_point() -> None:
    layer, x = nn.Linear(20, 6, bias=False), weights(5, 20)
    parametrize.register_parametrization(layer, "weight", FakeQuantise(2))
    layer(x).square().sum().backward()
    plain = layer.weight.detach().clone().requires_grad_()
    (x @ plain.T).square().sum().backward()
    assert torch.allclose(layer.parametrizations.weight.original.grad, plain.grad)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("scheme", "group", "bits"),
    [
        ("symmetric", None, 12 * 8 * 3 + 16 * 12),
        ("asymmetric", None, 12 * 8 * 3 + 32 * 12),
        ("symmetric", 4, 12 * 8 * 3 + 16 * 24),
    ],
)
def test_a_matrix_costs_its_codes_and_scales(scheme: Scheme, group: int | None, bits: int) -> None:
    layer = nn.Linear(8, 12, bias=True)
    assert model_bits(layer) == (108, 0, 108 * 16)
    parametrize.register_parametrization(layer, "weight", FakeQuantise(3, scheme, group))
    assert model_bits(layer) == (108, 96, bits + 12 * 16)
    assert model_bits(layer, rest=32).bits == bits + 12 * 32


# ---- the student ------------------------------------------------------------------------------------


class Net(Student):
    """A convolution, an embedding and two linear layers."""

    input_names = ("input",)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(1, 4, 3), nn.Embedding(3, 4)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, batch: Batch) -> Outputs:
        x = self.conv(batch["input"]).mean((2, 3)) + self.embed.weight[0]
        return Outputs(logits=self.last(self.first(x).relu()))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {"input": batch["input"]}


def test_chosen_layers_are_quantised_and_no_others() -> None:
    student = Quantised(base=Net(), bits=2, keep=["last"])
    assert student.names == ["conv", "first"]
    model: Any = student.model
    assert all(len(row.unique()) <= 3 for row in model.conv.weight.flatten(1))
    assert len(model.last.weight.unique()) == 40
    assert len(model.embed.weight.unique()) == 12


def test_what_is_shipped_says_the_same_without_quantisers() -> None:
    student = Quantised(base=Net(), bits=2).eval()
    batch = Batch({"id": torch.arange(6), "input": weights(6, 1, 8, 8)})
    shipped = student.deploy()
    with torch.no_grad():
        assert torch.equal(shipped(batch["input"])["logits"], student(batch).logits)
    assert not any("parametrizations" in name for name in shipped.state_dict())
    plain = Net()
    plain.load_state_dict(student.parameters_to_ship())
    with torch.no_grad():
        assert torch.equal(plain(batch).logits, student(batch).logits)
    assert any("parametrizations" in name for name in student.state_dict())  # and the student is as it was


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"layers": ["block*"]}, "no linear layer or convolution of this name"),
        ({"keep": ["nowhere"]}, "no linear layer or convolution of this name"),
        ({"group": 3}, "does not divide"),
    ],
)
def test_layers_that_do_not_fit_are_refused(params: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Quantised(base=Net(), **params)


def test_a_student_starts_as_its_teacher_rounded(tmp_path: Path) -> None:
    """Learning rate 0 is rounding alone; 8 bits are near the teacher, and everything outside the blocks is equal."""
    run(tmp_path / "run", "train.optimizer.lr=0.0", "student.bits=8")
    shipped = load_tensors(tmp_path / "run/student.safetensors", "test")
    (file,) = (tmp_path / "run").glob("stages/*/teacher-main/teacher.safetensors")
    teacher = {name.removeprefix("module."): v for name, v in load_tensors(file, "test").items()}
    assert set(shipped) == set(teacher)
    rounded = [name for name in shipped if not torch.equal(shipped[name], teacher[name])]
    assert sorted(rounded) == sorted(
        f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("qkv", "out", "up", "down")
    )
    for name in rounded:
        assert torch.allclose(shipped[name], quantise(teacher[name], 8))


def test_training_moves_master_weights_and_ships_two_bits(tmp_path: Path) -> None:
    run(tmp_path / "run")
    shipped = load_tensors(tmp_path / "run/student.safetensors", "test")
    assert all(len(row.unique()) <= 3 for row in shipped["blocks.0.qkv.weight"])
    student, loaded = load_student(tmp_path / "run")
    batch = next(iter(loaded.source.loader("val")))
    with torch.no_grad():
        assert torch.allclose(student.deploy()(batch["input"])["logits"], student(batch).logits)
    master = student.state_dict()["base.module.blocks.0.qkv.parametrizations.weight.original"]
    assert len(master.unique()) > 1000


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["student.start=other"], "no such teacher"), (["teacher.main.args={width=32}"], "another model")],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run", *overrides)


# ---- CAKLD's gamma, the probes, the data ------------------------------------------------------------


def test_gamma_is_the_teachers_mean_probability_of_the_true_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[float, float]] = []
    confidence = CAKLD._confidence

    @torch.no_grad()
    def spied(self: CAKLD) -> float:
        teacher, total, count = self.run.teachers["main"], 0.0, 0
        train: Any = self.run.source.data.train
        for index in range(0, len(train), 200):  # one by one, the rows that the check looks at
            rows = train.batch(torch.arange(index, min(index + 200, len(train))))
            p = teacher(Batch({"id": torch.arange(len(rows["target"])), **rows})).logits.softmax(-1)
            for at in range(16):
                total += p[torch.arange(len(p)), at, rows["target"][:, at]].sum().item()
                count += len(p)
        found.append((confidence(self), total / count))
        return found[-1][0]

    monkeypatch.setattr(CAKLD, "_confidence", spied)
    run(tmp_path / "run", "loss=[{use='topkld.cakld'}]")
    ours, brute = found[-1]
    assert ours == pytest.approx(brute, rel=1e-5)
    assert 0.05 < ours < 0.9


def test_frechet_distance_in_closed_form() -> None:
    rows = np.random.default_rng(0).standard_normal((400, 3))
    assert frechet(rows, rows) == pytest.approx(0.0, abs=1e-6)
    assert frechet(rows + np.array([1.0, -2.0, 0.5]), rows) == pytest.approx(5.25, abs=1e-6)
    # of x and 2x: trace(a + 4a - 2 * 2a), beside the means' distance
    expected = np.trace(np.cov(rows, rowvar=False)) + np.square(rows.mean(0)).sum()
    assert frechet(2 * rows, rows) == pytest.approx(expected, rel=1e-6)


class Counting(nn.Module):
    """Says that the token after t is t + 1, then t + 2, t + 3; and after the class c (17 + c) that it is c."""

    def forward(self, batch: Batch) -> Outputs:
        ids = batch["input"]
        first = torch.where(ids >= 17, ids - 17, ids + 1) % 17
        logits = torch.zeros(*ids.shape, 17)
        for step, height in enumerate((30.0, 29.0, 28.0)):
            logits.scatter_(-1, (first + step).remainder(17).unsqueeze(-1), height)
        return Outputs(logits=logits)


def test_samples_are_of_the_k_most_probable_tokens_each_after_the_last() -> None:
    classes = torch.tensor([0, 3, 9])
    best = sampled(Counting(), classes, 1, torch.Generator().manual_seed(0))
    assert best.tolist() == [[(c + i) % 17 for i in range(16)] for c in (0, 3, 9)]
    some = sampled(Counting(), torch.zeros(300, dtype=torch.int64), 2, torch.Generator().manual_seed(0))
    steps = torch.cat([some[:, :1], (some[:, 1:] - some[:, :-1]).remainder(17) - 1], 1)
    assert set(steps.unique().tolist()) == {0, 1}
    share = steps.double().mean().item()  # e^-1 / (1 + e^-1) of 4,800 draws
    assert share == pytest.approx(0.2689, abs=0.02)


def test_the_data_are_rasters_with_the_class_first() -> None:
    data = digit_tokens()
    assert sum(len(part) for part in (data.train, data.val, data.test)) == 1797
    batch = data.train.batch(torch.arange(50))
    assert torch.equal(batch["input"][:, 1:], batch["target"][:, :-1])
    assert ((batch["input"][:, 0] >= 17) & (batch["input"][:, 0] < 27)).all()
    assert batch["target"].min() >= 0
    assert batch["target"].max() <= 16


def test_the_model_sees_no_later_token() -> None:
    torch.manual_seed(0)
    model = token_model(width=16, depth=1, heads=2)
    ids = torch.randint(0, 17, (2, 16))
    changed = ids.clone()
    changed[:, 9:] = 3
    assert torch.allclose(model(ids)[:, :9], model(changed)[:, :9], atol=1e-6)


def test_probes_measure_a_run(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "probe=[{use='topkld.samples', count=40}, {use='topkld.bits'}]").results[
        "probes"
    ]
    assert set(found["topkld.samples"]) == {"frechet_distance", "class_accuracy", "kl_loss"}
    quantised = 2 * (3 + 1 + 4 + 4) * 64 * 64
    bits = found["topkld.bits"]
    assert bits["quantised"] == quantised
    assert bits["bits"] == 2 * quantised + 16 * 2 * (192 + 64 + 256 + 64) + 16 * (bits["weights"] - quantised)
