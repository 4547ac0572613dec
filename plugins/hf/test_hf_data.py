"""The text data, and whole runs on it: vocabularies that must agree, metrics, the same student in chunks."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_hf.data import (
    byte_pair,
    encode,
    python_documents,
    split_documents,
    text,
    unique_passages,
)

import kdcore
from kdcore.errors import InputError

CONFIG = {
    "model_type": "llama",
    "vocab_size": 270,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of Python's documentation as text files."""
    made = tmp_path_factory.mktemp("texts")
    for name in ("assert", "break", "pass", "global", "del", "nonlocal", "return", "while"):
        (made / f"{name}.txt").write_text(python_documents()[name], "utf-8")
    return made


@pytest.fixture
def recipe(folder: Path) -> dict[str, Any]:
    source = {"folder": str(folder), "vocab": 270, "block": 16, "val": 0.2, "test": 0.3}
    teacher = {"use": "hf", "config": {**CONFIG, "hidden_size": 24}, "train": {"epochs": 1}}
    return {
        "data": {"source": "kd_plugin_hf.data:text", "args": source, "batch_size": 16},
        "teacher": {"main": teacher},
        "student": {"use": "hf", "config": dict(CONFIG)},
        "task": {"use": "language"},
        "loss": [{"use": "kd", "temperature": 1.0}],
        "train": {"epochs": 1, "optimizer": {"use": "AdamW", "lr": 1e-2}},
    }


def passages(body: str) -> set[str]:
    found = {" ".join(part.split()) for part in re.split(r"\n\s*\n", body)}
    return {part for part in found if len(part) >= 60}


def test_no_split_has_a_passage_of_another() -> None:
    """Python's documentation prints many passages under several topics."""
    whole = python_documents()
    assert sum(map(len, map(passages, whole.values()))) > len(set().union(*map(passages, whole.values())))
    documents = unique_passages(whole)
    parts = split_documents({name: len(body) for name, body in documents.items()}, (0.1, 0.2), 0)
    seen = [set().union(*(passages(documents[name]) for name in part)) for part in parts]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert set().union(*seen) == set().union(*map(passages, whole.values()))


def test_splits_have_their_shares_and_follow_the_seed_alone() -> None:
    sizes = {name: len(body) for name, body in unique_passages(python_documents()).items()}
    train, val, test = split_documents(sizes, (0.1, 0.2), 0)
    assert sorted([*train, *val, *test]) == sorted(sizes)
    whole = sum(sizes.values())
    assert sum(sizes[n] for n in val) / whole == pytest.approx(0.1, abs=0.02)
    assert sum(sizes[n] for n in test) / whole == pytest.approx(0.2, abs=0.02)
    assert split_documents(sizes, (0.1, 0.2), 0) == (train, val, test)
    assert split_documents(sizes, (0.1, 0.2), 1)[2] != test


def test_the_tokenizer_is_the_same_each_time_and_loses_nothing() -> None:
    bodies = list(python_documents().values())[:10]
    coder = byte_pair(bodies, 300)
    assert coder.to_str() == byte_pair(bodies, 300).to_str()
    assert coder.get_vocab_size() == 300
    strange = "naïve → 漢字\n\t<end>"
    for body in (bodies[0], "naïve → 漢字\n\ttabs"):
        assert coder.decode(encode(coder, body)[:-1]) == body
    assert max(encode(coder, strange)) < 300


def test_blocks(folder: Path) -> None:
    data = text(folder=str(folder), vocab=270, block=16, val=0.2, test=0.3)
    again = text(folder=str(folder), vocab=270, block=16, val=0.2, test=0.3)
    ids: list[int] = []
    for part, other in zip(
        (data.train, data.val, data.test), (again.train, again.val, again.test), strict=True
    ):
        values = part.values
        assert all(torch.equal(value, other.values[name]) for name, value in values.items())
        real = values["attention_mask"].bool()
        assert torch.equal(values["target"] == -100, ~real)
        assert torch.equal(values["target"][real], values["input_ids"][real])
        assert (real.sum(1) > 1).all()
        assert (real.int().diff(dim=1) <= 0).all()  # padding stands at the end
        ids += values["id"].tolist()
    assert len(ids) == len(set(ids))
    assert data.classes == 270
    assert "8 documents" in data.description


def test_a_tokenizer_of_ones_own(folder: Path, tmp_path: Path) -> None:
    coder = byte_pair(["some other text, some other words"], 262)
    coder.save(str(tmp_path / "tokenizer.json"))
    data = text(folder=str(folder), tokenizer=str(tmp_path / "tokenizer.json"), block=16)
    assert data.classes == coder.get_vocab_size()
    assert int(data.train.values["input_ids"].max()) < coder.get_vocab_size()
    with pytest.raises(InputError, match="no tokenizer can be read"):
        text(folder=str(folder), tokenizer=str(folder))
    with pytest.raises(InputError, match="three or more"):
        text(folder=str(tmp_path))


def test_a_run_and_the_same_run_on_hidden_states(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Losses from hidden states in chunks train the same student as losses on logits."""
    dense = kdcore.run(recipe, out=tmp_path / "dense")
    chunks = copy.deepcopy(recipe)
    chunks["student"]["unembed"] = chunks["teacher"]["main"]["unembed"] = True
    apart = kdcore.run(chunks, out=tmp_path / "chunks")
    assert 1 < dense.metrics["perplexity"] < 270
    assert apart.metrics == pytest.approx(dense.metrics, rel=1e-4)
    assert set(dense.results["test"]) == {"main", "student"}


def test_perplexity_is_that_of_transformers_own_loss(recipe: dict[str, Any], tmp_path: Path) -> None:
    from kdcore.shipping import load_student

    found = kdcore.run(recipe, out=tmp_path / "run")
    student, run = load_student(tmp_path / "run")
    total = count = 0.0
    for batch in run.source.loader("test"):
        judged = int((batch["target"][:, 1:] != -100).sum())
        own = student.model(
            batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["target"]
        )
        total, count = total + own.loss.item() * judged, count + judged
    assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_micro_batches_give_the_same_student(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The supervised tokens are counted over the whole batch, before any forward."""
    whole = kdcore.run(recipe, out=tmp_path / "whole")
    recipe["train"]["accumulate"] = 4
    parts = kdcore.run(recipe, out=tmp_path / "parts")
    assert parts.metrics["perplexity"] == pytest.approx(whole.metrics["perplexity"], rel=1e-4)


def test_vocabularies_must_agree_before_anything_is_trained(recipe: dict[str, Any]) -> None:
    recipe["teacher"]["main"]["config"]["vocab_size"] = 280
    with pytest.raises(InputError, match="280 classes, the student 270"):
        kdcore.check(recipe)
    recipe["student"]["unembed"] = recipe["teacher"]["main"]["unembed"] = True
    with pytest.raises(InputError, match=r"270.*280"):
        kdcore.check(recipe)


def test_a_vocabulary_without_room_for_the_datas_tokens(recipe: dict[str, Any]) -> None:
    recipe["student"]["config"]["vocab_size"] = 260
    with pytest.raises(InputError, match="has 270 tokens, the model 260"):
        kdcore.check(recipe)


def test_a_padded_vocabulary_is_fine(recipe: dict[str, Any], tmp_path: Path) -> None:
    for table in (recipe["student"], recipe["teacher"]["main"]):
        table["config"]["vocab_size"] = 288
    assert kdcore.run(recipe, out=tmp_path / "run").metrics["perplexity"] < 288


def test_labels_must_fit_an_image_classifier() -> None:
    config = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 9}
    config |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = {"data": {"source": "kdcore.datasets:digits"}, "student": {"use": "hf", "config": config}}
    with pytest.raises(InputError, match="has 10 classes, the model 9"):
        kdcore.check(recipe)
    config["num_labels"] = 10
    kdcore.check(recipe)
