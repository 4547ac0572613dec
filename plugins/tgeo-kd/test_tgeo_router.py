"""TGeo-KD in a run: who learns from what, what stays as it was, resume, refusals, what is shipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_tgeo_kd.data import confused_digits
from kd_plugin_tgeo_kd.demo import recipe_of
from kd_plugin_tgeo_kd.loss import fused_loss
from kd_plugin_tgeo_kd.router import TGeoKD
from torch import Tensor

import kdcore
from kdcore import Batch, InputError, Outputs
from kdcore import recipe as recipes
from kdcore.checkpoint import load_tensors
from kdcore.shipping import load_student

SHORT = ["train.epochs=3", "teacher.main.train.epochs=1", "data.args.labels=50", "data.batch_size=16"]
IMAGES = [
    *("data.source=kdcore.datasets:digits", "data.args={labels=40}", "teacher.main.data={}"),
    *("teacher.main.model=kdcore.zoo:conv_net", "teacher.main.args={width=2}"),
    *("student.model=kdcore.zoo:conv_net", "student.args={width=2}"),
]
Look = Callable[[TGeoKD, Batch, Callable[[], None]], None]


def run(folder: Path, *overrides: str, **kwargs: Any) -> Any:
    return kdcore.run("tgeo-kd:digits", out=folder, overrides=[*SHORT, *overrides], **kwargs)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Runs the recipe with ``look(router, batch, outer_step)`` in the place of each outer step."""

    def start(look: Look, *overrides: str) -> list[int]:
        outer, steps = TGeoKD.before_step, list[int]()

        def before_step(self: TGeoKD, batch: Batch) -> None:
            steps.append(self.run.step)
            look(self, batch, lambda: outer(self, batch))

        monkeypatch.setattr(TGeoKD, "before_step", before_step)
        run(tmp_path / "run", *overrides)
        return steps

    return start


def copied(module: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


# ---- the outer step ---------------------------------------------------------------------------------


def test_the_outer_step_has_the_gradient_through_the_look_ahead(
    watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against differentiating J_val(theta - rate grad J_train) as written, through the core's own objective."""

    def look(router: TGeoKD, batch: Batch, outer_step: Callable[[], None]) -> None:
        given: list[Tensor] = []
        monkeypatch.setattr(router.run, "update", lambda component, loss: given.append(loss))
        outer_step()
        omega = list(router.f.parameters())
        ours = torch.autograd.grad(given[0], omega)
        theta = dict(router.run.student.named_parameters())
        held = router._held_out(len(batch))
        with router._asked("ahead"):
            train = router.run.objective(batch, theta)
        steps = torch.autograd.grad(train, list(theta.values()), create_graph=True)
        ahead = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), steps, strict=True)}
        z = torch.func.functional_call(router.run.student, ahead, (held,)).logits
        value = torch.nn.functional.cross_entropy(z, held["target"])  # the labels' loss and nothing else
        for mine, direct in zip(ours, torch.autograd.grad(value, omega), strict=True):
            assert direct.abs().max() > 0
            assert torch.allclose(mine, direct, rtol=1e-3, atol=float(direct.abs().max()) * 1e-4)

    assert watched(look)


def test_omega_moves_and_theta_does_not(watched: Any) -> None:
    """That omega moves is what the released code fails."""

    def look(router: TGeoKD, batch: Batch, outer_step: Callable[[], None]) -> None:
        student, f = copied(router.run.student), copied(router.f)
        outer_step()
        assert same(copied(router.run.student), student)  # batch norm's statistics among them
        assert all(p.grad is None for p in router.run.student.parameters())
        moved = copied(router.f)
        assert all(not torch.equal(value, f[name]) for name, value in moved.items())

    assert len(watched(look, *IMAGES)) == 6


def test_the_students_step_leaves_omega_alone(watched: Any) -> None:
    after: list[dict[str, Tensor]] = []

    def look(router: TGeoKD, batch: Batch, outer_step: Callable[[], None]) -> None:
        assert not after or same(copied(router.f), after[-1])
        assert all(p.grad is None for p in router.f.parameters())
        outer_step()
        after.append(copied(router.f))

    assert watched(look)


def test_the_step_weighs_both_terms_by_the_ratio(watched: Any) -> None:
    def look(router: TGeoKD, batch: Batch, outer_step: Callable[[], None]) -> None:
        ask = router.run.ask
        student, teacher = ask("student", batch), ask("main", batch)
        alpha = router.f(router.geometry(batch, student, teacher)).detach()
        expected = fused_loss(student["logits"], teacher["logits"], batch["target"], alpha).mean()
        assert router.run.objective(batch).item() == pytest.approx(expected.item(), rel=1e-5)
        assert router(batch, student, {"main": teacher}).requires_grad is False
        outer_step()

    assert watched(look)


def test_the_geometry_carries_no_gradient_and_tbar_is_the_class_mean(watched: Any) -> None:
    def look(router: TGeoKD, batch: Batch, outer_step: Callable[[], None]) -> None:
        student, teacher = router.run.ask("student", batch), router.run.ask("main", batch)
        delta = router.geometry(batch, student, teacher)
        assert delta.shape == (len(batch), 90)
        assert student["logits"].requires_grad
        assert not delta.requires_grad
        rows = [
            (router.run.ask("main", b)["logits"].softmax(1), b["target"]) for b in router.run.data("train")
        ]
        T, y = (torch.cat(each) for each in zip(*rows, strict=True))
        for c in y.unique():
            assert torch.allclose(router.means[c], T[y == c].mean(0), atol=1e-6)
        assert torch.allclose(router.means.sum(1), torch.ones(10), atol=1e-6)

    assert watched(look)


def test_held_out_samples_are_of_tune_and_the_teacher_is_not_asked_about_them(watched: Any) -> None:
    drawn: list[tuple[int, ...]] = []

    def look(router: TGeoKD, batch: Batch, outer_step: Callable[[], None]) -> None:
        known = {int(i) for b in router.run.data("tune") for i in b["id"]}
        held = router._held_out(len(batch))
        drawn.append(tuple(held["id"].tolist()))
        assert set(drawn[-1]) <= known
        assert not known & set(batch["id"].tolist())
        asked: list[int] = []
        hook = router.run.teachers["main"].register_forward_hook(lambda m, a, o: asked.append(len(a[0])))
        outer_step()
        hook.remove()
        assert asked == [len(batch)]  # once, for the inner objective

    watched(look, "router.held_out=4")
    assert {len(rows) for rows in drawn} == {4}
    assert len(set(drawn)) > 1


def test_every_so_many_steps(watched: Any) -> None:
    moved: list[bool] = []

    def look(router: TGeoKD, batch: Batch, outer_step: Callable[[], None]) -> None:
        f = copied(router.f)
        outer_step()
        moved.append(not same(copied(router.f), f))

    watched(look, "router.every=3")
    assert moved == [step % 3 == 0 for step in range(len(moved))]


def test_the_released_controller_never_learns(watched: Any) -> None:
    seen: list[dict[str, Tensor]] = []

    def look(router: TGeoKD, batch: Batch, outer_step: Callable[[], None]) -> None:
        assert [p.shape[0] for p in router.f.parameters()] == [32, 32, 16, 16, 1, 1]
        outer_step()
        seen.append(copied(router.f))

    watched(look, "router.variant=released", "data.tune=0.0")  # it needs no held-out labels
    assert all(same(one, seen[0]) for one in seen)


# ---- the whole run ----------------------------------------------------------------------------------


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    geometry = TGeoKD.geometry

    def crashing(self: TGeoKD, *args: Any) -> Tensor:
        if self.run.step == 4:
            raise ConnectionError("power cut")
        return geometry(self, *args)

    monkeypatch.setattr(TGeoKD, "geometry", crashing)
    with pytest.raises(ConnectionError):
        run(tmp_path / "cut", "train.checkpoint_every=1")
    monkeypatch.undo()
    run(tmp_path / "cut", "train.checkpoint_every=1", resume=True)
    ours, theirs = (load_tensors(tmp_path / n / "student.safetensors", "test") for n in ("cut", "whole"))
    assert same(ours, theirs)


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    run(tmp_path / "one")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [*launch, "--rdzv-endpoint", "localhost:0", "-m", "kdcore", "run", "tgeo-kd:digits", *SHORT]
    done = subprocess.run(
        [sys.executable, *command, "--quiet", "--out", str(tmp_path / "two")], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    ours, theirs = (load_tensors(tmp_path / n / "student.safetensors", "test") for n in ("two", "one"))
    assert all(torch.allclose(value, theirs[name], atol=1e-5) for name, value in ours.items())


def test_only_the_student_is_shipped(tmp_path: Path) -> None:
    run(tmp_path / "run")
    shipped = load_tensors(tmp_path / "run/student.safetensors", "test")
    assert sum(value.numel() for value in shipped.values()) == 64 * 32 + 32 + 32 * 10 + 10
    student, loaded = load_student(tmp_path / "run")
    batch = next(iter(loaded.source.loader("val")))
    with torch.no_grad():
        assert torch.equal(student.deploy()(batch["input"])["logits"], student(batch).logits)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.tune=0.0"], "no tune split"),
        (["train.optimizer={use='SGD'}"], "names no lr"),
        (["teacher.second={use='module', model='kdcore.zoo:mlp', args={hidden=[8]}}"], "one teacher"),
    ],
)
def test_refusals_say_what_to_do(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run", *overrides)


@pytest.mark.parametrize(
    "target", [None, torch.tensor([0, -100]), torch.zeros(2, 3), torch.zeros(2, 3).long()]
)
def test_every_sample_needs_a_label(target: Tensor | None) -> None:
    said = Outputs(logits=torch.zeros(2, 3))
    batch = Batch({"id": torch.arange(2)} | ({} if target is None else {"target": target}))
    with pytest.raises(InputError, match="needs the label of every sample"):
        TGeoKD().geometry(batch, said, said)


def test_dense_logits_are_refused() -> None:
    said, batch = Outputs(logits=torch.zeros(2, 3, 4, 4)), Batch({"target": torch.zeros(2).long()})
    with pytest.raises(InputError, match="weighs samples of a classifier"):
        TGeoKD().geometry(batch, said, said)


# ---- the demonstration ------------------------------------------------------------------------------


def test_the_data_are_confused_in_training_alone() -> None:
    clean, confused = confused_digits(labels=300), confused_digits(labels=300, confused={"3": 8})
    three = clean.train.values["target"] == 3
    assert three.any()
    assert (confused.train.values["target"][three] == 8).all()
    assert torch.equal(confused.train.values["target"][~three], clean.train.values["target"][~three])
    for split in ("val", "test"):
        assert torch.equal(getattr(confused, split).values["target"], getattr(clean, split).values["target"])
    ids = [getattr(confused_digits(labels=1000), s).values["id"] for s in ("train", "val", "test")]
    assert torch.cat(ids).unique().numel() == 1797
    with pytest.raises(InputError, match="renamed"):
        confused_digits(confused={"3": 10})
    with pytest.raises(InputError, match="more than there are"):
        confused_digits(labels=1001)


@pytest.mark.parametrize(
    ("arm", "alpha"),
    [
        ("TGeo-KD", None),
        ("labels", 0.0),
        ("fixed 0.2", 0.2),
        ("fixed 0.2, all labels", 0.2),
        ("f untrained", None),
    ],
)
def test_every_arm_is_a_recipe(arm: str, alpha: float | None) -> None:
    recipe = recipes.parse(recipe_of(arm, 3, []))
    assert (recipe.router is None) is (alpha is not None)
    assert recipe.data.tune == (0.0 if "all" in arm else 0.2)
    if alpha:
        assert (recipe.loss[0].weight, recipe.task.weight) == (alpha, 1 - alpha)
    assert bool(recipe.teacher) is (arm != "labels")
