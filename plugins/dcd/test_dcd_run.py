"""DCD in a run: what the selection leaves, what the student starts from and keeps, the data, the recipe's end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kd_plugin_dcd.data import pairs
from kd_plugin_dcd.select import HardNegatives
from kd_plugin_dcd.student import LayerCopy

import kdcore
from kdcore import Batch, InputError
from kdcore import recipe as recipes
from kdcore.building import assemble
from kdcore.distill import Distiller
from kdcore.shipping import load_student
from kdcore.stages import StageRun

SCORER = {"model": "kd_plugin_dcd.scorer:pair_scorer"}
RECIPE: dict[str, Any] = {
    "data": {
        "source": "kd_plugin_dcd.data:pairs",
        "args": {"train": 24, "negatives": 15, "held_out": 10},
        "batch_size": 8,
    },
    "teacher": {
        "main": {"use": "module", **SCORER, "args": {"width": 8, "depth": 4}, "inputs": ["image", "text"]}
    },
    "student": {
        "use": "dcd",
        **SCORER,
        "args": {"width": 8, "depth": 2},
        "start": {
            "image": "image",
            "text": "text",
            "blocks.0": "blocks.0",
            "blocks.1": "blocks.3",
            "head": "head",
        },
        "train": ["module.fuse*", "module.blocks*", "module.head*"],
    },
    "augmentation": [{"use": "dcd", "keep": 3, "method": True}],
    "task": {"use": "classification", "metrics": ["kd_plugin_dcd.metrics:MeanRecall"]},
    "loss": [{"use": "dcd"}],
    "train": {"steps": 6, "optimizer": {"use": "AdamW", "lr": 1e-2}},
}
Prepare = Callable[..., Distiller]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    def made(*overrides: str) -> Distiller:
        recipe = recipes.check(recipes.read(RECIPE, overrides))
        run = StageRun(recipe, "test", tmp_path)
        return run.context(assemble(recipe, run.source, run.builder()))[0]

    return made


def selection(distiller: Distiller) -> HardNegatives:
    found = next(iter(distiller.parts.augmentations.values()))
    assert isinstance(found, HardNegatives)
    return found


# ---- the selection ----------------------------------------------------------------------------------


def test_the_student_sees_the_match_and_the_texts_that_the_teacher_scores_highest(prepare: Prepare) -> None:
    distiller = prepare()
    batch = distiller.run.sample
    said = distiller.teachers["main"](batch).logits
    fewer = selection(distiller)(batch)
    for i, row in enumerate(said.tolist()):
        hardest = sorted(range(1, 16), key=lambda column: -row[column])[:3]
        assert torch.equal(fewer["text"][i], batch["text"][i, [0, *hardest]])
        assert fewer["top_scores"][i].tolist() == pytest.approx(sorted(row, reverse=True)[:4], abs=1e-6)
    assert torch.equal(fewer["image"], batch["image"])
    assert batch["text"].shape == (4, 16, 20)


def test_a_match_elsewhere_comes_first(prepare: Prepare) -> None:
    distiller = prepare()
    batch = distiller.run.sample
    moved = Batch({**batch, "text": batch["text"].roll(5, 1), "target": torch.full((4,), 5)})
    one, two = selection(distiller)(batch), selection(distiller)(moved)
    assert torch.equal(one["text"], two["text"])
    assert two["target"].tolist() == [0] * 4


def test_random_negatives_before_the_warm_share_is_over(prepare: Prepare) -> None:
    distiller = prepare("augmentation.0.warm=0.5")
    batch, chosen, run = distiller.run.sample, selection(distiller), distiller.run
    run.total_steps = 10
    seen = {}
    for run.step in (0, 4, 5):
        seen[run.step] = chosen(batch)
    assert torch.equal(seen[0]["text"], batch["text"][:, :4])
    assert torch.equal(seen[4]["text"], seen[0]["text"])
    assert not torch.equal(seen[5]["text"], seen[0]["text"])
    scores = distiller.teachers["main"](seen[0]).logits.sort(1, descending=True).values
    assert torch.allclose(
        seen[0]["top_scores"], scores, atol=1e-6
    )  # of what the student sees, not of hidden texts
    chosen.by = "random"
    assert torch.equal(chosen(batch)["text"], seen[0]["text"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("augmentation.0.teacher=mian", "augmentation.0.teacher"),
        ('augmentation.0.keys=["caption"]', "'caption' is absent"),
        ("augmentation.0.keep=16", "more than 16 candidates"),
    ],
)
def test_what_cannot_be_selected_is_said(prepare: Prepare, override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        prepare(override)


# ---- the student ------------------------------------------------------------------------------------


def test_the_student_starts_with_copies_and_shares_no_storage(prepare: Prepare) -> None:
    distiller = prepare()
    student, teacher = distiller.student.model, distiller.teachers["main"].model
    rows = {"image": "image", "blocks.0": "blocks.0", "blocks.1": "blocks.3", "head": "head"}
    for mine, theirs in rows.items():
        for p, q in zip(
            student.get_submodule(mine).parameters(), teacher.get_submodule(theirs).parameters(), strict=True
        ):
            assert torch.equal(p, q)
            assert p.data_ptr() != q.data_ptr()
    assert not torch.equal(student.state_dict()["fuse.0.weight"], teacher.state_dict()["fuse.0.weight"])


def test_encoders_stay_and_the_rest_learns(tmp_path: Path) -> None:
    checkpoint = tmp_path / "teacher.pt"
    teacher = kdcore.build("student", "dcd", **SCORER, args={"width": 8, "depth": 4}).model
    torch.save(teacher.state_dict(), checkpoint)
    overrides = [f"teacher.main.checkpoint={checkpoint}"]
    kdcore.run(RECIPE, out=tmp_path / "run", overrides=overrides)
    student, _ = load_student(tmp_path / "run")
    assert isinstance(student, LayerCopy)
    mine, theirs = student.model.state_dict(), teacher.state_dict()
    for name in ("image.0.weight", "image.0.bias", "text.0.weight", "text.0.bias"):
        assert torch.equal(mine[name], theirs[name])
    assert not torch.equal(mine["head.weight"], theirs["head.weight"])
    shapes, axes = student.shapes({"image": torch.zeros(2, 20), "text": torch.zeros(2, 9, 20)})
    assert shapes == {"image": ("batch", 20), "text": ("batch", "candidates", 20)}
    assert axes["candidates"] == (1, 128)
    assert student.shapes({"text": torch.zeros(2, 200, 20)})[1]["candidates"] == (1, 200)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('student.start={ head = "haed" }', "no such module of the teacher"),
        ('student.start={ haed = "head" }', "no such module of the student"),
        ('student.start={ head = "fuse.0" }', "does not fit"),
        ("student.teacher=other", "no such teacher"),
    ],
)
def test_what_cannot_be_copied_is_said(prepare: Prepare, override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        prepare(override)


# ---- the data ---------------------------------------------------------------------------------------


def test_negatives_are_other_texts_and_drawn_anew() -> None:
    data = pairs(train=12, negatives=5, held_out=3).train
    draws = [data.augment(data[4], np.random.default_rng(seed))["text"] for seed in range(40)]
    assert all(torch.equal(each[0], data.text[4]) for each in draws)
    places = [[int((data.text == row).all(1).nonzero()) for row in each] for each in draws]
    assert all(len(set(row)) == 6 for row in places)
    assert {place for row in places for place in row[1:]} == set(range(12)) - {4}


def test_held_out_images_choose_among_all_texts() -> None:
    data = pairs(train=12, negatives=5, held_out=3)
    items = [data.test[i] for i in range(3)]
    assert [item["target"] for item in items] == [0, 1, 2]
    assert all(torch.equal(item["text"], items[0]["text"]) for item in items)
    ids = [int(split[i]["id"]) for split in (data.train, data.val, data.test) for i in range(len(split))]
    assert sorted(ids) == list(range(18))
    with pytest.raises(InputError, match="more than there are other texts"):
        pairs(train=5, negatives=5)
