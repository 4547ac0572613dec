"""SgVA-CLIP in a run: what it takes from the teacher, what it tunes, what it ships; and the demonstration's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_sgva_clip.adapter import prototypes
from kd_plugin_sgva_clip.data import PAIRS, few_shots
from kd_plugin_sgva_clip.fusion import search
from kd_plugin_sgva_clip.student import SgVA
from torch import Tensor, nn

import kdcore
from kdcore import InputError
from kdcore.checkpoint import load_tensors
from kdcore.shipping import load_student
from kdcore.task import Task

SHORT = ["train.epochs=6", "train.eval_every=3", "teacher.main.train.epochs=3", "data.eval_batch_size=32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("sgva") / "run"
    kdcore.run("sgva-clip:digits", out=where, overrides=SHORT)
    return where


def loaded(folder: Path) -> tuple[SgVA, Any]:
    student, run = load_student(folder)
    assert isinstance(student, SgVA)
    return student, run


def said(student: SgVA, run: Any, split: str) -> dict[str, Tensor]:
    with torch.no_grad():
        rows = [
            {**student(b).tensors, "logits": student(b).logits, "y": b["target"]}
            for b in run.source.loader(split)
        ]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def test_clip_is_the_teachers_but_for_the_prompt(folder: Path) -> None:
    student, run = loaded(folder)
    teacher = load_tensors(run.folder / "teacher-main" / "teacher.safetensors", "test")
    own = student.clip.state_dict()
    moved = {name for name, value in teacher.items() if not torch.equal(value, own[name])}
    assert moved == {"module.text.context"}
    p = own["module.encoder.projection.weight"].T
    assert torch.allclose(student.inverse, torch.linalg.pinv(p), atol=1e-5)
    assert student.adapter.alpha.item() != 0.5  # it learns in float32, too


def test_prototypes_are_those_of_the_shots_and_the_weight_is_tuned_on_tune(folder: Path) -> None:
    student, run = loaded(folder)
    shots, tune = said(student, run, "train"), said(student, run, "tune")
    expected = prototypes(shots["adapted"], shots["y"], 10)
    assert torch.allclose(student.prototypes, expected, atol=1e-6)
    weight, accuracy = search(tune["logits"], tune["image_text"], tune["y"])
    assert student.weight.item() == pytest.approx(weight)
    task = Task(run.recipe.task, 10)
    assert run.evaluate(student, task, "tune")["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_what_is_shipped_has_no_text_tower_and_answers_the_same(folder: Path) -> None:
    student, run = loaded(folder)
    batch = next(iter(run.source.loader("val")))
    shipped = student.deploy().eval()
    assert not any("text." in name for name, _ in shipped.named_parameters())
    assert isinstance(student.towers.text, nn.Module)  # the student keeps its own
    graph = torch.export.export(shipped, tuple(student.inputs(batch).values())).module()
    with torch.no_grad():
        expected = student.infer(student(batch))["logits"]
        assert torch.allclose(graph(batch["input"])["logits"], expected, atol=1e-5)


def test_the_released_variant_trains_on_its_own_prototypes(folder: Path, tmp_path: Path) -> None:
    kdcore.run("sgva-clip:digits", out=tmp_path / "r", overrides=[*SHORT, "student.variant=released"])
    first, second = loaded(folder)[0], loaded(tmp_path / "r")[0]
    assert not torch.equal(first.adapter.linear1.weight, second.adapter.linear1.weight)
    assert second.weight.item() not in {i / 20 for i in range(21)}  # a uniform draw


def test_a_fixed_weight_and_prompt_stay(tmp_path: Path) -> None:
    fixed = [
        "student.tune=false",
        "student.fusion=0.3",
        "student.prompt_rate=0",
        'student.train=["adapter.*"]',
    ]
    kdcore.run("sgva-clip:digits", out=tmp_path / "r", overrides=[*SHORT, *fixed])
    student, run = loaded(tmp_path / "r")
    assert student.weight.item() == pytest.approx(0.3)
    teacher = load_tensors(run.folder / "teacher-main" / "teacher.safetensors", "test")
    assert torch.equal(student.clip.state_dict()["module.text.context"], teacher["module.text.context"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("student.start=other", "no teacher of this name"),
        ("train.accumulate=2", "an episode is a batch"),
        ("data.source=kdcore.datasets:digits", "tunes its fusion weight"),
    ],
)
def test_what_cannot_run_is_said_before_training(override: str, words: str, tmp_path: Path) -> None:
    over = [*SHORT, override]
    if "source" in override:
        over += ["data.args={flat=true}", "teacher.main.data={}"]
    with pytest.raises(InputError, match=words):
        kdcore.run("sgva-clip:digits", out=tmp_path / "r", overrides=over)


# ---- the demonstration's data -----------------------------------------------------------------------


def test_the_splits_are_apart_and_balanced() -> None:
    data = few_shots(shots=3, tune_shots=2, split_seed=1)
    parts = [part.values for part in (data.train, data.tune, data.val, data.test)]
    captioned = few_shots(captions=True, split_seed=1).train.values
    ids = torch.cat([part["id"] for part in (*parts, captioned)])
    assert sorted(ids.tolist()) == list(range(1797))
    assert torch.bincount(parts[0]["target"]).tolist() == [3] * 10
    assert torch.bincount(parts[1]["target"]).tolist() == [2] * 10
    with pytest.raises(InputError, match="nothing to test on"):
        few_shots(shots=100)


def test_captions_name_the_class_or_its_partner() -> None:
    from sklearn.datasets import load_digits

    captioned = few_shots(captions=True).train.values
    truth, told = torch.tensor(load_digits().target)[captioned["id"]], captioned["target"]
    partner = dict(PAIRS) | {b: a for a, b in PAIRS}
    wrong = told != truth
    assert all(partner[int(t)] == int(w) for t, w in zip(truth[wrong], told[wrong], strict=True))
    assert wrong.float().mean().item() == pytest.approx(0.45, abs=0.06)


def test_support_is_another_view_of_the_same_image() -> None:
    import numpy as np

    train = few_shots(noise=0.05).train
    clean = train[0]
    item = train.augment(clean, np.random.default_rng(0))
    apart = [(item[name] - clean["input"]).std().item() for name in ("input", "support")]
    assert apart == pytest.approx([0.05, 0.05], rel=0.3)
    assert not torch.equal(item["input"], item["support"])
