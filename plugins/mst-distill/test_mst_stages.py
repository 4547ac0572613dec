"""MST-Distill's stages: what each trains and leaves, what masks do to a teacher, resume, the student alone at the end."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_mst_distill.data import paired_digits
from kd_plugin_mst_distill.demo import ARMS
from kd_plugin_mst_distill.loss import MSTLoss, divergence
from kd_plugin_mst_distill.masks import MaskNet, Specialised
from kd_plugin_mst_distill.stages import Route, Specialise
from torch import Tensor, nn

import kdcore
from kdcore import Batch, InputError
from kdcore import recipe as recipes
from kdcore.building import Builder
from kdcore.checkpoint import load_tensors, save_tensors
from kdcore.folder import placed
from kdcore.parts import Parts
from kdcore.shipping import load_run, load_student
from kdcore.stages import StageRun
from kdcore.tables import TaskTable
from kdcore.task import Task

SHORT = [
    "data.args.train=64",
    "data.args.val=40",
    "train.epochs=2",
    "stage.0.train.epochs=1",
    "stage.1.train.epochs=2",
]
LAYERS = ("hidden0.0", "hidden1.0")
STUDENT = "stages/distill/student/weights.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of all three stages."""
    folder = tmp_path_factory.mktemp("mst") / "run"
    kdcore.run("mst-distill:digits", out=folder, overrides=SHORT)
    return folder


def left(folder: Path, stage: str) -> dict[str, Any]:
    text = (folder / f"stages/{stage}/artefacts.json").read_text("utf-8")
    found: dict[str, Any] = placed(json.loads(text), folder)
    return found


def base(checkpoint: str | None = None) -> Any:
    table = {"model": "kdcore.zoo:mlp", "args": {"inputs": 64, "hidden": [48, 24]}, "inputs": ["both"]}
    return (
        Builder(0)
        .make("teacher", "module", table | ({"checkpoint": checkpoint} if checkpoint else {}), "t")
        .eval()
    )


def masked(
    tmp_path: Path, layers: tuple[str, ...], constant: float | None = None
) -> tuple[Specialised, list[MaskNet]]:
    """The base with random masks on layers, or with masks that are everywhere ``constant`` (in logits)."""
    nets = []
    for index, layer in enumerate(layers):
        torch.manual_seed(index)
        net = MaskNet({"hidden0.0": 48, "hidden1.0": 24}[layer], 6, 3)
        if constant is not None:
            nn.init.zeros_(net.score.weight)
            nn.init.constant_(net.score.bias, constant)
        save_tensors(tmp_path / f"{index}.safetensors", net.state_dict())
        nets.append(net.eval())
    files = {layer: str(tmp_path / f"{i}.safetensors") for i, layer in enumerate(layers)}
    return Specialised(base=base(), masks=files).eval(), nets


def both(count: int = 6) -> Batch:
    return Batch(
        {"id": torch.arange(count), "both": torch.rand(count, 64, generator=torch.Generator().manual_seed(3))}
    )


def logits(teacher: Any, batch: Batch) -> Tensor:
    said = teacher(batch).logits
    assert isinstance(said, Tensor)
    return said


# ---- the specialised teacher ------------------------------------------------------------------------


def test_a_mask_of_ones_is_the_base(tmp_path: Path) -> None:
    teacher, _ = masked(tmp_path, LAYERS, constant=40.0)
    assert torch.allclose(logits(teacher, both()), logits(base(), both()), atol=1e-6)
    closed, _ = masked(tmp_path, LAYERS, constant=-40.0)
    assert torch.allclose(logits(closed, both()), base().model.head.bias.expand(6, 10), atol=0.6)
    assert not torch.allclose(logits(closed, both()), logits(base(), both()), atol=1e-3)


def test_the_mask_multiplies_before_the_relu_and_only_in_its_own_forward(tmp_path: Path) -> None:
    teacher, (net,) = masked(tmp_path, LAYERS[:1])
    model: Any = teacher.model
    batch = both()
    raw = model.hidden0[0](batch["both"])
    by_hand = model.head(model.hidden1(torch.relu(raw * net(raw))))
    assert torch.allclose(logits(teacher, batch), by_hand, atol=1e-6)
    plain = model(batch["both"])
    assert torch.equal(plain, logits(base(), batch))  # the base itself is as it was
    assert not torch.allclose(plain, by_hand, atol=1e-3)


def test_masks_of_several_teachers_do_not_pile_up(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, _ = masked(tmp_path / "a", LAYERS[:1])
    second, _ = masked(tmp_path / "b", LAYERS[1:])
    alone = logits(second, both())
    logits(first, both())
    assert torch.equal(logits(second, both()), alone)


# ---- stage 2 ----------------------------------------------------------------------------------------


def stage_two(folder: Path, **params: Any) -> tuple[Specialise, StageRun]:
    recipe = recipes.read(folder / "recipe.lock.toml").tree
    whole = recipes.parse(recipe)
    view = recipes.parse_stage(whole, whole.stage[1], "stage.1")
    artefacts = {f"cotrain.{k}": v for k, v in left(folder, "cotrain").items()}
    stage = Specialise(layers=params.pop("layers", {"both": list(LAYERS), "other": list(LAYERS)}), **params)
    return stage, StageRun(view, "specialise", folder / "again", artefacts)


def test_stage_two_trains_the_masks_alone_as_one_adam_each_would(finished: Path) -> None:
    stage, run = stage_two(finished)
    group = stage.group(run)
    twin = copy.deepcopy(group.masks)
    before = {n: v.clone() for n, v in group.state_dict().items() if not n.startswith("masks.")}
    distiller, context = run.context(Parts(group, Task(TaskTable(use="none"), None)))
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in group.masks.parameters()}
    together = torch.optim.Adam(trained, lr=1e-2)
    separate = {key: torch.optim.Adam(net.parameters(), lr=1e-2) for key, net in twin.items()}
    for batch in list(context.source.loader("val"))[:1] * 4:
        with torch.no_grad():
            target = group.student(batch).logits
        for (
            name,
            layer,
        ), key in group.places.items():  # the authors' loop: hook on, step this mask, hook off
            with group.taps[name].reading({layer: twin[key].apply_to}):  # type: ignore[dict-item]
                z = group.teachers[name](batch).logits
            separate[key].zero_grad()
            divergence(z, target).mean().backward()
            separate[key].step()
        together.zero_grad()
        distiller(batch).backward()
        together.step()
    after = group.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for ours, theirs in zip(group.masks.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_masks_with_the_lowest_loss_are_kept(finished: Path) -> None:
    rows = [
        json.loads(row)
        for row in (finished / "stages/specialise/specialise/metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert len(losses) == 2
    result = json.loads((finished / "stages/specialise/specialise/result.json").read_text("utf-8"))
    assert result["metrics"]["loss"] == pytest.approx(min(losses))


def test_layers_that_are_not_there_are_named(finished: Path) -> None:
    stage, run = stage_two(finished, layers={"third": ["hidden0"]})
    with pytest.raises(InputError, match="no such teacher"):
        stage.group(run)
    stage, run = stage_two(finished, layers={"both": ["hidden7"]})
    with pytest.raises(InputError, match="no module at this path"):
        stage.group(run)
    stage, run = stage_two(finished, start="nowhere")
    with pytest.raises(InputError, match="no such artefact"):
        stage.group(run)


# ---- stage 3 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "masks"),
    [("paper", [LAYERS[:1], LAYERS[1:]] * 2), ("released", [LAYERS[:1], LAYERS] * 2)],
)
def test_masks_pile_up_in_the_released_variant_only(
    finished: Path, variant: Any, masks: list[tuple[str, ...]]
) -> None:
    _, run = load_run(finished)
    whole = recipes.parse(recipes.read(finished / "recipe.lock.toml").tree)
    view = Route(variant=variant).view(whole, run.artefacts)
    assert list(view.teacher) == ["both-0", "both-1", "other-0", "other-1"]
    assert [tuple(table.params["masks"]) for table in view.teacher.values()] == masks
    assert view.router is not None
    assert view.router.params["variant"] == variant
    bare = Route(masked=False).view(whole, run.artefacts)
    assert all(table.params["masks"] == {} for table in bare.teacher.values())


def test_the_student_begins_where_co_training_left_it(finished: Path) -> None:
    student = load_tensors(left(finished, "cotrain")["student"], "test")
    _, run = load_run(finished)
    made = Builder(run.seed, run.artefacts).make("student", "module", run.recipe.student.params, "student")
    assert all(torch.equal(value, student[name]) for name, value in made.model.state_dict().items())
    trained = load_tensors(finished / STUDENT, "test")
    assert any(not torch.equal(trained[f"module.{name}"], value) for name, value in student.items())


def test_a_run_that_stopped_before_stage_three_goes_on_with_it(finished: Path, tmp_path: Path) -> None:
    before = load_tensors(finished / STUDENT, "test")
    kept = {p: p.stat().st_mtime_ns for p in finished.glob("stages/[cs]*/**/*.safetensors")}
    shutil.move(finished / "stages/distill", tmp_path / "distill")
    (finished / "results.json").unlink()
    kdcore.run("mst-distill:digits", out=finished, overrides=SHORT, resume=True)
    assert {p: p.stat().st_mtime_ns for p in finished.glob("stages/[cs]*/**/*.safetensors")} == kept
    after = load_tensors(finished / STUDENT, "test")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_run_killed_while_routing_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MSTLoss.forward

    def crashing(self: MSTLoss, *args: Any) -> Tensor:
        if self.run.step == 3:
            raise ConnectionError("power cut")
        return forward(self, *args)

    monkeypatch.setattr(MSTLoss, "forward", crashing)
    overrides = [*SHORT, "train.checkpoint_every=1"]
    with pytest.raises(ConnectionError):
        kdcore.run("mst-distill:digits", out=tmp_path / "run", overrides=overrides)
    monkeypatch.undo()
    kdcore.run("mst-distill:digits", out=tmp_path / "run", overrides=overrides, resume=True)
    ours, theirs = load_tensors(tmp_path / "run" / STUDENT, "test"), load_tensors(finished / STUDENT, "test")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.slow
def test_two_processes_route_as_one(finished: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [*launch, "--rdzv-endpoint", "localhost:0", "-m", "kdcore", "run", "mst-distill:digits", *SHORT]
    done = subprocess.run(
        [sys.executable, *command, "--quiet", "--out", str(tmp_path / "two")], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    for file in (STUDENT, "stages/cotrain/both.safetensors", "stages/specialise/both-hidden0-0.safetensors"):
        ours, theirs = load_tensors(tmp_path / "two" / file, "test"), load_tensors(finished / file, "test")
        assert all(torch.allclose(ours[name], value, atol=1e-5) for name, value in theirs.items())


def test_gate_and_masks_stay_behind(finished: Path) -> None:
    student, run = load_student(finished)
    shipped = load_tensors(finished / "student.safetensors", "test")
    assert sum(v.numel() for v in shipped.values()) == 32 * 48 + 48 + 48 * 24 + 24 + 24 * 10 + 10
    batch = next(iter(run.source.loader("val")))
    assert list(student.inputs(batch)) == ["top"]  # the student sees its own modality alone
    with torch.no_grad():
        said = student.deploy()(batch["top"])["logits"]
        assert torch.equal(said, student(batch).logits)


# ---- the demonstration ------------------------------------------------------------------------------


def test_the_data_are_halves_of_the_same_images() -> None:
    data = paired_digits(train=50, val=30, noise=0.0, split_seed=2)
    sets = (data.train, data.val, data.test)
    assert [len(s) for s in sets] == [50, 30, 1717]
    ids = torch.cat([s.values["id"] for s in sets])
    assert sorted(ids.tolist()) == list(range(1797))
    values = data.train.values
    assert torch.equal(torch.cat([values["top"], values["bottom"]], 1), values["both"])
    with pytest.raises(InputError, match="no test image"):
        paired_digits(train=1500, val=300)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe(arm: str) -> None:
    tree = copy.deepcopy(recipes.read("mst-distill:digits").tree)
    ARMS[arm](tree)
    recipe = recipes.parse(tree)
    student_epochs = (recipe.train.epochs or 0) + (0 if "alone" in arm or arm.startswith("KD") else 30)
    assert student_epochs == 90  # as many passes for every student
