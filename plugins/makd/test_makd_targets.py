"""The answers: how they are asked, kept and given out, and the demonstration's oracle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_makd.aspects import QUESTIONS, look
from kd_plugin_makd.targets import Ask, SideTargets, Targets, digest, read_released
from safetensors import safe_open
from torch import Tensor

from kdcore import Batch, InputError
from kdcore.recipe import parse
from kdcore.stages import StageRun

IDS = torch.tensor([30, 10, 20, 40])
P = torch.tensor([[0.3, 0.0], [0.1, 1.0], [0.2, 0.5], [0.4, 0.25]])
Y = torch.tensor([1, 0, 1, 0])


def table(path: Path) -> str:
    Targets(IDS, P, Y).save(path / "t.safetensors", ["a?", "b?"])
    return str(path / "t.safetensors")


def test_rows_come_by_id_in_any_order() -> None:
    found = Targets(IDS, P, Y)
    assert torch.equal(found.rows(torch.tensor([40, 10, 40])), P[[3, 1, 3]])
    for unknown in (5, 15, 99):
        with pytest.raises(InputError, match="no answers for these samples"):
            found.rows(torch.tensor([10, unknown]))


@pytest.mark.parametrize(
    ("ids", "aspects", "words"),
    [
        (IDS, P * 4, "probabilities"),
        (IDS, P * float("nan"), "probabilities"),
        (torch.tensor([1, 1, 2, 3]), P, "two rows"),
        (IDS[:3], P, r"\[N,Q\]"),
        (IDS, P[:, 0], r"\[N,Q\]"),
    ],
)
def test_tables_that_cannot_be_are_refused(ids: Tensor, aspects: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Targets(ids, aspects)


def test_a_table_keeps_its_questions(tmp_path: Path) -> None:
    path = table(tmp_path)
    found = Targets.load(path)
    assert torch.equal(found.rows(IDS), P)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert json.loads(header["questions"]) == ["a?", "b?"]
    assert header["sha256"] == digest(["a?", "b?"]) != digest(["b?", "a?"])


def test_the_authors_file(tmp_path: Path) -> None:
    path = tmp_path / "pets.json"
    path.write_text(json.dumps({"cat_1_a": [0.5, 1.0], "dog_2_b": [0.25, 0.0]}), "utf-8")
    found = read_released(path, ["dog_2_b", "cat_1_a"])
    assert found.rows(torch.tensor([0, 1])).tolist() == [[0.25, 0.0], [0.5, 1.0]]
    with pytest.raises(InputError, match="no answers for these images"):
        read_released(path, ["dog_2_b", "bird"])


def test_ablations_of_the_answers(tmp_path: Path) -> None:
    batch, path = Batch({"id": IDS, "target": Y}), table(tmp_path)
    own = SideTargets(table=path)(batch)["aspects"]
    assert torch.equal(own, P)
    assert "aspects" not in batch  # the caller's batch is left alone
    classes = SideTargets(table=path, whose="class")(batch)["aspects"]
    torch.testing.assert_close(classes[Y == 1], P[Y == 1].mean(0).expand(2, -1))
    torch.testing.assert_close(classes[Y == 0], P[Y == 0].mean(0).expand(2, -1))
    many = Targets(torch.arange(200), torch.rand(200, 3, generator=torch.Generator().manual_seed(0)))
    mixed, ids = many.shuffled(0), torch.arange(200)
    assert torch.equal(mixed.rows(ids).sort(0).values, many.rows(ids).sort(0).values)
    assert (mixed.rows(ids) == many.rows(ids)).all(1).sum() < 10
    assert torch.equal(mixed.rows(ids), many.shuffled(0).rows(ids))
    with pytest.raises(InputError, match="no labels"):
        many.by_class()


def test_streams_and_data_with_answers_of_their_own(tmp_path: Path) -> None:
    part = Batch({"id": IDS})
    both = Batch(parts={"labelled": part, "other": Batch({"id": torch.tensor([7])})})
    found = SideTargets(table=table(tmp_path), stream="labelled")(both)
    assert torch.equal(found.part("labelled")["aspects"], P)
    assert "aspects" not in found.part("other")
    given = Batch({"id": IDS, "aspects": P})
    assert SideTargets()(given) is given


# ---- asking ---------------------------------------------------------------------------------------------


def stage_run(folder: Path) -> StageRun:
    folder.mkdir()
    data = {
        "source": "kdcore.datasets:digits",
        "args": {"labels": 30},
        "batch_size": 10,
        "eval_batch_size": 16,
    }
    tree: dict[str, Any] = {"data": data, "student": {"use": "module", "model": "kdcore.zoo:mlp"}}
    return StageRun(parse(tree), "ask", folder)


def test_every_training_image_is_asked_once_and_no_label_is_shown(tmp_path: Path) -> None:
    seen: list[Batch] = []

    def answer(batch: Batch, questions: Sequence[str]) -> Tensor:
        seen.append(batch)
        yes = batch["input"].flatten(1).mean(1)
        return torch.stack([torch.stack([yes, 0 * yes], -1)] * len(questions), 1)  # [B,Q,2]

    run = stage_run(tmp_path / "ask")
    ask = Ask(answer=answer, questions=["dark?", "bright?"])
    found = ask.run(run)
    targets = Targets.load(found["targets"])
    train = run.source.data.train.values
    assert sum(map(len, seen)) == 30
    assert all("target" not in batch for batch in seen)
    expected = torch.sigmoid(train["input"].flatten(1).mean(1))
    torch.testing.assert_close(targets.rows(train["id"]), expected[:, None].expand(-1, 2))
    assert targets.target is not None
    assert torch.equal(targets.target, train["target"][train["id"].argsort()])
    count = len(seen)
    assert ask.run(run) == found  # a resumed run asks nobody
    assert len(seen) == count
    assert found["sha256"] == digest(["dark?", "bright?"])


def test_questions_from_a_file_and_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("Is it furry?\n\nHas it a tail?\n", "utf-8")

    def wrong(batch: Batch, questions: Sequence[str]) -> Tensor:
        return torch.zeros(len(batch), 5)

    ask = Ask(answer=wrong, questions=str(path))
    assert ask.questions == ["Is it furry?", "Has it a tail?"]
    with pytest.raises(InputError, match="wrong shape"):
        ask.run(stage_run(tmp_path / "run"))
    for bad in ([], ["a?", "a?"], str(tmp_path / "none.txt")):
        with pytest.raises(InputError, match=r"stage\.questions"):
            Ask(answer=wrong, questions=bad)


# ---- the demonstration's oracle ---------------------------------------------------------------------------


def drawn(*lines: str) -> Tensor:
    return torch.tensor([[float(c == "#") for c in line] for line in lines])


RING = drawn("........", "..####..", "..#..#..", "..####..", "...##...", "...#....", "...#....", "...#....")
BAR = drawn("....#...", "....#...", "....#...", "....#...", "....#...", "....#...", "....#...", "....#...")
OPEN = drawn("........", "........", "........", ".######.", ".#....#.", ".#....#.", ".#....#.", "###.....")


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        ("Is there a closed hole?", (1, 0, 0)),
        ("Is there a closed hole in the upper half?", (1, 0, 0)),
        ("Is there a closed hole in the lower half?", (0, 0, 0)),
        ("Is most of the ink in the upper half?", (1, None, 0)),
        ("Is it at least five pixels wide?", (0, 0, 1)),
        ("Does a line through the middle cross more than one stroke?", (0, 0, 1)),
        ("Is there ink at the left of the bottom row?", (0, 0, 1)),
    ],
)
def test_the_oracle_looks_at_the_image(question: str, answers: tuple[int | None, ...]) -> None:
    """The mean over many ids, so that the noise of one answer does not count."""
    for image, expected in zip((RING, BAR, OPEN), answers, strict=True):
        batch = Batch({"id": torch.arange(50), "input": image.expand(50, 1, 8, 8)})
        p = look(batch, [question])
        assert p.shape == (50, 1)
        if expected is not None:
            assert abs(p.mean().item() - expected) < 0.3


def test_its_noise_belongs_to_the_sample() -> None:
    batch = Batch({"id": torch.tensor([3, 4]), "input": torch.stack([RING, RING]).flatten(1)})
    p = look(batch, list(QUESTIONS))
    assert not torch.equal(p[0], p[1])
    assert torch.equal(look(batch.rows(torch.tensor([1])), list(QUESTIONS))[0], p[1])
    with pytest.raises(InputError, match="cannot answer"):
        look(batch, ["Is it furry?"])
