"""PCoreSet in a run: what is trained on, what is bought, whose labels are never looked at, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_pcoreset.augment import Buyer
from kd_plugin_pcoreset.data import biased_teacher, structured_pool
from kd_plugin_pcoreset.selection import farthest_first
from kd_plugin_pcoreset.stages import bought
from torch import nn

import kdcore
from kdcore import Data, InputError
from kdcore.checkpoint import load_tensors
from kdcore.shipping import load_student

C, Q = 6, 5
DATA = {"supers": 2, "each": 3, "size": 120, "test": 60}
RECIPE: dict[str, Any] = {
    "data": {
        "source": "kd_plugin_pcoreset.data:structured_pool",
        "args": DATA,
        "batch_size": {"labelled": 16, "unlabelled": 16},
        "epoch": "labelled",
        "eval_batch_size": 50,
    },
    "teacher": {
        "main": {
            "use": "module",
            "model": "kd_plugin_pcoreset.data:biased_teacher",
            "args": {"supers": 2, "each": 3},
        }
    },
    "student": {
        "use": "module",
        "model": "kdcore.zoo:mlp",
        "args": {"inputs": 32, "hidden": [8], "classes": C},
    },
    "task": {"stream": "labelled"},
    "loss": [{"use": "kd"}],
    "augmentation": [{"use": "pcoreset", "queries": Q}],
    "train": {"steps": 12, "optimizer": {"use": "AdamW", "lr": 1e-2}, "eval_every": 2},
    "stage": [{"use": "pcoreset.rounds", "name": "rounds", "count": 2}],
}


def falsified(**args: Any) -> Data:
    """The same pool, with wrong labels on all that is not labelled from the start."""
    data = structured_pool(**args)
    values = data.train["labelled"].values
    values["target"] = torch.where(values["start"], values["target"], (values["target"] + 1) % C)
    return data


def read(path: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(path.read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pcoreset") / "run"
    kdcore.run(RECIPE, out=where)
    return where


def test_labelled_and_pool_stay_a_partition_that_moves_by_q_a_round(folder: Path) -> None:
    rounds = folder / "stages" / "rounds"
    lists = [read(rounds / f"round-{i}" / "labelled.json") for i in range(2)]
    start = structured_pool(**DATA).train["labelled"].values
    paid = start["id"][start["start"]].tolist()
    assert len(paid) == C
    for found in lists:
        assert len(found["bought"]) == Q
        assert not set(found["bought"]) & set(paid)
        paid = found["labelled"]
        assert set(found["bought"]) < set(paid)
    assert len(set(paid)) == len(paid) == C + 2 * Q
    assert bought(rounds) == [found["bought"] for found in lists]
    left = json.loads((rounds / "artefacts.json").read_text("utf-8"))
    assert len(left["test"]) == 3
    assert left["labelled"].endswith("round-1/labelled.json")


def test_what_is_bought_is_farthest_by_the_students_probabilities(folder: Path) -> None:
    student, run = load_student(folder)
    weights = folder / "stages" / "rounds" / "round-0" / "student" / "weights.safetensors"
    student.load_state_dict(load_tensors(weights, "test"))
    values = structured_pool(**DATA).train["labelled"].values
    with torch.no_grad():
        p = student.eval().deploy()(values["input"])["logits"].double().softmax(1)
    paid = values["start"]
    picks = farthest_first(p[~paid], p[paid], Q)[0]
    assert bought(run.folder)[0] == values["id"][~paid][picks].tolist()


def test_each_round_begins_with_a_new_student(folder: Path) -> None:
    first, last = (
        json.loads((folder / "stages/rounds" / part / "student/result.json").read_text("utf-8"))
        for part in ("round-0", ".")
    )
    prints = [each["guards"]["fingerprint"]["student"] for each in (first, last)]
    assert prints[0] != prints[1]
    assert first["steps"] == last["steps"] == 12


def test_a_run_that_stopped_between_rounds_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    stopped = shutil.copytree(folder, tmp_path / "run")
    inside = stopped / "stages" / "rounds"
    for path in (stopped / "results.json", inside / "artefacts.json", inside / "student.safetensors"):
        path.unlink()
    for path in (inside / "round-1", inside / "student"):
        shutil.rmtree(path)
    kdcore.run(RECIPE, out=stopped, resume=True)
    assert bought(inside) == bought(folder / "stages" / "rounds")
    one, two = (
        load_tensors(path / "student.safetensors", "test") for path in (folder / "stages/rounds", inside)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_labels_that_are_not_paid_for_change_nothing(folder: Path, tmp_path: Path) -> None:
    over = [f"data.source={__name__}:falsified", "stage=[]"]
    kdcore.run(RECIPE, out=tmp_path / "wrong", overrides=over)
    kdcore.run(RECIPE, out=tmp_path / "right", overrides=["stage=[]"])
    kept = [tmp_path / name / "stages" / "distill" for name in ("wrong", "right")]
    assert read(kept[0] / "labelled.json") == read(kept[1] / "labelled.json")
    one, two = (load_tensors(path / "student.safetensors", "test") for path in kept)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read(kept[1] / "labelled.json")["bought"] == bought(folder / "stages" / "rounds")[0]


@pytest.mark.parametrize("strategy", ["random", "entropy", "coreset", "nearest"])
def test_the_baselines_run(strategy: str, tmp_path: Path) -> None:
    tapped = ["augmentation.0.features=logits"] if strategy == "coreset" else []
    over = [f"augmentation.0.strategy={strategy}", "stage=[]", *tapped]
    kdcore.run(RECIPE, out=tmp_path / "run", overrides=over)
    found = read(tmp_path / "run/stages/distill/labelled.json")
    assert len(set(found["bought"])) == Q
    assert len(set(found["labelled"])) == C + Q


def test_a_block_is_every_labelled_sample_as_often_as_the_others(folder: Path) -> None:
    class Run:
        def rng(self, key: str) -> torch.Generator:
            return torch.Generator().manual_seed(0)

    buyer = Buyer(queries=Q)
    buyer.rows, buyer.run = torch.tensor([3, 8, 11]), Run()  # type: ignore[assignment]
    block = buyer.draw(9, 0)
    assert torch.bincount(block, minlength=12)[[3, 8, 11]].tolist() == [3, 3, 3]
    assert buyer.draw(8, 0).tolist() == block[:8].tolist()


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["augmentation.0.labelled=absent.json"], "cannot be read"),
        (["augmentation=[]"], "need one that buys labels"),
        (
            ["data.source=kdcore.datasets:digits", "data.args={flat=true}"],
            "no sample of the pool is labelled",
        ),
    ],
)
def test_what_cannot_run_is_said(over: list[str], words: str, tmp_path: Path) -> None:
    if "digits" in over[0]:
        over = [
            *over,
            "data.epoch=main",
            "data.batch_size=16",
            "student.args.inputs=64",
            "student.args.classes=10",
        ]
        over += ["stage=[]", "teacher.main.model=kdcore.zoo:mlp", "teacher.main.args={}", "task.stream=main"]
    with pytest.raises(InputError, match=words):
        kdcore.run(RECIPE, out=tmp_path / "run", overrides=over)


# ---- the demonstration's world ------------------------------------------------------------------------


def test_the_pool_has_a_long_tail_and_one_label_a_class() -> None:
    data = structured_pool(split_seed=3)
    values = data.train["labelled"].values
    counts = torch.bincount(values["target"], minlength=30).sort(descending=True).values
    # shares exp(-3 r / 30): the first class has exp(2.9) = 18.2 times the last one's samples
    assert counts[0] / counts[-1] > 8
    assert torch.bincount(values["target"][values["start"]]).tolist() == [1] * 30
    assert "target" not in data.train["unlabelled"].values
    assert torch.bincount(data.test.values["target"]).tolist() == [50] * 30
    ids = torch.cat([part.values["id"] for part in (data.train["labelled"], data.val, data.test)])
    assert len(ids.unique()) == len(ids)


def test_the_teacher_knows_the_superclass_and_mistakes_the_class() -> None:
    values = structured_pool(split_seed=3).test.values
    said = biased_teacher(split_seed=3)(values["input"]).argmax(1)
    assert (said // 3 == values["target"] // 3).float().mean() > 0.9
    assert 0.5 < (said == values["target"]).float().mean() < 0.85
    exact = biased_teacher(split_seed=3, right=1.0)(values["input"]).argmax(1)
    assert (exact == values["target"]).float().mean() > 0.93
    assert isinstance(biased_teacher(), nn.Module)
