"""HARD: its objectives in closed form, who is moved by which step, resume to the bit, pictures, export."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kd_plugin_hard.affine import Affine
from kd_plugin_hard.augment import HARD, evaluating
from kd_plugin_hard.loss import augmentor_loss, disagreement
from kd_plugin_hard.oracle import ORACLES
from kd_plugin_hard.pictures import moments
from kd_plugin_hard.views import View
from torch import Tensor, nn

import kdcore
from kdcore.building import assemble
from kdcore.checkpoint import load_tensors, newest_state
from kdcore.distill import Distiller
from kdcore.errors import InputError
from kdcore.optimizers import own_optimizers, trainable
from kdcore.recipe import parse, read
from kdcore.report import read_metrics
from kdcore.stages import StageRun
from kdcore.testing.oracle import check_oracle
from kdcore.types import Batch

Tree = dict[str, Any]


def short(**augmentation: Any) -> Tree:
    """The recipe in six steps, with changes of the augmentor."""
    found: Tree = read("hard:digits", ["data.args.labels=100", "data.batch_size=32"]).tree
    found["train"] = {"steps": 6, "optimizer": found["train"]["optimizer"]}
    found["teacher"]["main"]["train"] = {"epochs": 1}
    found["augmentation"][0].update(augmentation)
    return found


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_oracle(oracle: Any) -> None:
    check_oracle(oracle)


# ---- the objectives ---------------------------------------------------------------------------------


def one_pixel(a: Tensor, *, equivariant: bool) -> Tensor:
    """The augmentor's loss (no log) of a shift a of the input 0: the student says (x, 0), the teacher (0, 0), or the same
    as the student."""
    student = torch.stack([a, torch.zeros_like(a)]).unsqueeze(0)
    teacher = student if equivariant else torch.zeros(1, 2, dtype=torch.float64)
    return augmentor_loss(student, teacher, torch.zeros(1, 2, dtype=torch.float64), log=False)


@pytest.mark.parametrize("at, value", [(1.0, 0.12011), (2.0, 0.43378)])
def test_two_classes_on_a_line(at: float, value: float) -> None:
    """Where they disagree |a| grows, d = -tanh(a/2)/2; where they agree the teacher's change pulls it back."""
    a = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    loss = one_pixel(a, equivariant=False)
    assert loss.item() == pytest.approx(-value, abs=5e-6)
    assert torch.autograd.grad(loss, a)[0].item() == pytest.approx(-math.tanh(at / 2) / 2)
    loss = one_pixel(a, equivariant=True)
    assert loss.item() == pytest.approx(value, abs=5e-6)
    assert torch.autograd.grad(loss, a)[0].item() == pytest.approx(math.tanh(at / 2) / 2)


def test_a_student_like_its_teacher_gives_the_augmentor_nothing() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    apart = disagreement(logits, logits, temperature=3.0)
    torch.testing.assert_close(apart, torch.zeros_like(apart), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(apart.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_student_change_needs_the_clean_answer() -> None:
    with pytest.raises(ValueError, match="student_clean"):
        augmentor_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), first_term="student-change")


# ---- one step of either side ------------------------------------------------------------------------


class Dropping(nn.Sequential):
    """A student with batch statistics and dropout, both of which an augmentor's step must leave alone."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(196, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(16, 10),
        )


@pytest.fixture
def home(tmp_path: Path) -> Callable[..., tuple[Distiller, HARD]]:
    """A prepared distiller with an untrained teacher, and its augmentor, which has seen a batch."""

    def make(**augmentation: Any) -> tuple[Distiller, HARD]:
        table = short(**augmentation)
        table["student"] = {"use": "module", "model": f"{__name__}:Dropping"}
        del table["teacher"]["main"]["train"], table["teacher"]["main"]["data"]
        stage = StageRun(parse(table), "distill", tmp_path)
        distiller, run = stage.context(assemble(stage.recipe, stage.source, stage.builder()))
        run.optimizers, run.total_steps = own_optimizers(distiller.parts, stage.recipe), 100
        (augmentor,) = distiller.parts.augmentations.values()
        distiller.train()
        augmentor(run.source.sample(24))
        return distiller, augmentor  # type: ignore[return-value]

    return make


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("first_term", ["disagreement", "student-change"])
def test_an_augmentor_step_moves_the_augmentor_alone(home: Callable[..., Any], first_term: str) -> None:
    distiller, augmentor = home(first_term=first_term)
    run = distiller.run
    before = [bits(m) for m in (run.student, run.teachers["main"], augmentor)]
    modes = [m.training for m in run.student.modules()]
    random_before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].sum()
    augmentor.after_step()
    after = [bits(m) for m in (run.student, run.teachers["main"], augmentor)]
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert [m.training for m in run.student.modules()] == modes
    assert any(modes)
    assert all(p.grad is None for m in (run.student, run.teachers["main"]) for p in m.parameters())
    assert torch.equal(random_before[0], torch.get_rng_state())
    assert random_before[1:] == (random.getstate(), np.random.get_state()[1].sum())


def test_the_augmentor_raises_the_disagreement_and_the_student_lowers_it(home: Callable[..., Any]) -> None:
    distiller, augmentor = home(lam_t=0.0)
    clean, noise = augmentor._clean, lambda: torch.Generator().manual_seed(3)

    def apart() -> float:
        value: float = augmentor._loss(clean, noise())[1]
        return value

    def descend(module: nn.Module, loss: Tensor) -> None:
        parameters = list(module.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.sub_(1e-2 * gradient / (gradient.norm() + 1e-12))

    before = apart()
    descend(augmentor, augmentor._loss(clean, noise())[0])
    hunted = apart()
    assert hunted > before + 1e-6
    run, seen = distiller.run, augmentor._seen(clean, noise())
    with evaluating(run.student):
        said = [run.ask(name, seen)["logits"] for name in ("student", "main")]
    descend(run.student, disagreement(*said, temperature=2.0).mean())
    assert apart() < hunted - 1e-6


def test_the_teachers_change_holds_the_view_back(home: Callable[..., Any]) -> None:
    """The stability term has a gradient: the teacher is asked with one. Without the first term it is all there is."""
    _, augmentor = home(lam_s=0.0, lam_t=1.0)
    loss, _ = augmentor._loss(augmentor._clean, torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(loss, list(augmentor.parameters()))
    assert sum(float(g.abs().sum()) for g in gradients) > 1e-6


def test_an_augmentor_that_changes_nothing_is_plain_distillation(tmp_path: Path) -> None:
    """The student's weights are those without augmentation, up to what resampling rounds."""
    still = {"use": "hard.affine", "spread": 0.0}
    recipes = [short(views=[still], steps=0, pictures=0), {**short(), "augmentation": []}]
    folders = [kdcore.run(each, out=tmp_path / str(i)).folder for i, each in enumerate(recipes)]
    one, two = (load_tensors(folder / "student.safetensors", "test") for folder in folders)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4)


def test_share_and_seeds(home: Callable[..., Any]) -> None:
    distiller, augmentor = home(share=0.5)
    run = distiller.run
    batch = run.source.sample(400)
    first, again = augmentor(batch)["input"], augmentor(batch)["input"]
    assert torch.equal(first, again)
    run.step = 1
    assert not torch.equal(first, augmentor(batch)["input"])
    left = (first == batch["input"]).flatten(1).all(1).float().mean().item()
    assert 0.4 < left < 0.6
    assert torch.equal(augmentor(batch)["target"], batch["target"])


def test_thresholds_rest_and_hunt_again() -> None:
    """From above high until below low; at once in between, as before."""
    augmentor = HARD(views=[Affine()], thresholds=(0.3, 3.0))
    states = []
    for apart in (1.0, 3.1, 2.0, 0.4, 0.2, 0.5, 3.5):
        augmentor.hunting = augmentor._hunts(apart)
        states.append(augmentor.hunting)
    assert states == [True, False, False, False, True, True, False]
    other = HARD(views=[Affine()], thresholds=(0.3, 3.0))
    other.load_state_dict(augmentor.state_dict())
    assert other.hunting is False


def test_streams_that_hold_images(home: Callable[..., Any]) -> None:
    distiller, augmentor = home(share=1.0)
    one, two = (distiller.run.source.sample(n) for n in (3, 5))
    other = Batch({"id": torch.arange(2), "text": ["a", "b"]})
    changed = augmentor(Batch(parts={"one": one, "two": two, "other": other}))
    for name, part in {"one": one, "two": two}.items():
        assert (changed.part(name)["input"] - part["input"]).abs().amax((1, 2, 3)).gt(1e-4).all()
    assert changed.part("other") == other
    before = bits(augmentor)
    augmentor.after_step()
    assert not same(before, bits(augmentor))


def test_a_resting_augmentor_does_not_move(home: Callable[..., Any]) -> None:
    _, augmentor = home(thresholds=(0.0, 0.0))
    before = bits(augmentor)
    augmentor.after_step()
    assert same(before, bits(augmentor))


def test_the_runs_optimiser_never_sees_the_views(home: Callable[..., Any]) -> None:
    distiller, augmentor = home()
    mine = {id(p) for p in augmentor.parameters()}
    assert mine
    assert all(p.requires_grad for p in augmentor.parameters())
    assert not mine & {id(p) for p in trainable(distiller.parts)}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"views": []}, "not trainable views"),
        ({"views": [{"use": "hard.affine"}, {"use": "hard.colour", "key": "other"}]}, "different values"),
        ({"teacher": "nobody"}, "no such teacher"),
        ({"thresholds": [2.0, 1.0]}, "low is above high"),
        ({"views": [{"use": "hard.affine", "key": "target"}]}, "is no image"),
    ],
)
def test_what_cannot_be_is_refused(change: Tree, match: str) -> None:
    with pytest.raises(InputError, match=match):
        kdcore.check(short(**change))


# ---- whole runs -------------------------------------------------------------------------------------


class Crash(Exception):  # noqa: N818 - what a kill does, not a mistake
    pass


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The steps at which a run dies, once each, before or after the augmentor's own step."""
    at: set[int] = set()
    step = HARD.after_step

    def dying(self: HARD) -> None:
        if self.run.step in at and self.run.step % 2:
            at.discard(self.run.step)
            raise Crash
        step(self)
        if self.run.step in at:
            at.discard(self.run.step)
            raise Crash

    monkeypatch.setattr(HARD, "after_step", dying)
    return at


FAMILIES = [{"use": "hard.generator", "width": 4}, {"use": "hard.affine"}, {"use": "hard.colour"}]


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path: Path, crashing: set[int]) -> None:
    """Student, augmentor, its Adam and its threshold's state; all three families; killed at odd and even steps."""
    recipe = short(views=FAMILIES, thresholds=[0.5, 1.5], steps=2, pictures=1)
    recipe["train"] |= {"steps": 8, "checkpoint_every": 2}
    whole = kdcore.run(recipe, out=tmp_path / "whole")
    crashing.update({3, 6})
    broken = tmp_path / "broken"
    for _ in range(2):
        with pytest.raises(Crash):
            kdcore.run(recipe, out=broken, resume=broken.exists())
    assert not crashing
    kdcore.run(recipe, out=broken, resume=True)
    kept = ["student.safetensors", "stages/distill/student/metrics.jsonl"]
    kept += [
        f"stages/distill/pictures/{path.name}" for path in (broken / "stages/distill/pictures").iterdir()
    ]
    assert [f for f in kept if (broken / f).read_bytes() != (whole.folder / f).read_bytes()] == []
    last = [newest_state(f / "stages/distill/student/state") for f in (broken, whole.folder)]
    assert last[0] is not None
    assert last[1] is not None
    one, two = (dict(_leaves(each[1])) for each in last if each)
    assert any("optimizers" in name for name in one)
    assert one.keys() == two.keys()
    assert [n for n in one if n != "/seconds" and not _equal(one[n], two[n])] == []


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _leaves(each, f"{place}/{index}")
    else:
        yield place, value


def _equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def test_pictures_and_export(tmp_path: Path) -> None:
    """A picture at the first step and the last, in the report too; an artefact with no trace of the augmentor."""
    recipe = short(pictures=2)
    recipe["export"] = {"use": "onnx"}
    folder = kdcore.run(recipe, out=tmp_path / "run").folder
    found = sorted((folder / "stages/distill/pictures").iterdir())
    assert [path.name for path in found] == ["hard-affine-000001.png", "hard-affine-000006.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    assert found[0].read_bytes() != found[1].read_bytes()
    logged = read_metrics(folder / "stages/distill/student/metrics.jsonl")[0]
    assert logged["hard_disagreement"] > 0
    assert 0 < logged["hard_right"] < 1
    report = (folder / "report.md").read_text("utf-8")
    assert all(f"](stages/distill/pictures/{path.name})" in report for path in found)
    artefact = (folder / "artefact/model.onnx").read_bytes()
    assert b"head" in artefact
    assert b"spread" not in artefact


def test_moments() -> None:
    assert [sorted(moments(n, 100)) for n in (0, 1, 2, 4)] == [[], [100], [1, 100], [1, 34, 67, 100]]
    assert moments(5, 2) == {1, 2}


def test_a_view_of_ones_own() -> None:
    """What the README shows: any class of View can be trained."""

    class Fade(View):
        noise = 1

        def __init__(self) -> None:
            super().__init__("input", 0.0, 1.0)
            self.rate = nn.Parameter(torch.tensor(0.5))
            self.freeze()

        def transform(self, images: Tensor, z: Tensor) -> Tensor:
            return images * (-(self.rate * z).abs()).exp().view(-1, 1, 1, 1)

    with pytest.raises(TypeError, match=r"abstract.* transform"):
        type("Nothing", (View,), {})("input", 0.0, 1.0)
    augmentor = HARD(views=[Fade()])
    assert [name for name, p in augmentor.named_parameters() if p.requires_grad] == ["views.0.rate"]
