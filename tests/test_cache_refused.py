"""A cache that is not the answer to what the run asks is refused, with the difference in words."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kdcore.caching import Cache
from kdcore.caching.header import files_of, tensors_digest
from kdcore.caching.keys import Watched, row_keys
from kdcore.checkpoint import save_tensors
from kdcore.errors import InputError
from kdcore.types import Batch

Tree = dict[str, Any]
DATA = """
    import torch
    from kdcore import Data
    from kdcore.datasets import TensorSet

    CHANGE = {"order": False, "content": False, "tokenizer": "one", "ids": 0}

    def some(count: int = 40):
        draw = torch.Generator().manual_seed(0)
        def part(first, count):
            inputs = torch.randn(count, 64, generator=draw)
            return torch.arange(first, first + count), inputs, torch.arange(count) % 10
        ids, inputs, target = part(0, count)
        if CHANGE["order"]:
            ids, inputs, target = ids.flip(0), inputs.flip(0), target.flip(0)
        if CHANGE["content"]:
            inputs[17, 3] += 1e-3
        sets = [TensorSet(ids + CHANGE["ids"], input=inputs, target=target)]
        sets += [TensorSet(i, input=x, target=y) for i, x, y in (part(100, 20), part(200, 20))]
        return Data(*sets, classes=10, tokenizer=CHANGE["tokenizer"])
"""


@pytest.fixture
def recipe(tiny: Tree, write_module: Callable[..., str]) -> Tree:
    tiny["data"] = {"source": f"{write_module(DATA)}:some", "batch_size": 16}
    tiny["teacher"]["main"].pop("train")
    tiny["train"] = {"steps": 2}
    return tiny


def cached(tree: Tree, made: Cache) -> Tree:
    changed = copy.deepcopy(tree)
    changed["teacher"]["main"] |= {"use": "cached", "path": str(made.folder)}
    return changed


def refused(tree: Tree, folder: Path, *words: str) -> str:
    """The run is refused before its first step, and leaves nothing; every word is in the message."""
    with pytest.raises(InputError) as error:
        kdcore.run(tree, out=folder / "run")
    assert not (folder / "run").exists()
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def flip(tree: Tree, **change: Any) -> None:
    import importlib

    importlib.import_module(tree["data"]["source"].partition(":")[0]).CHANGE.update(change)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"order": True}, ("another order, or other samples", "position 0", "sample 39")),
        ({"ids": 1000}, ("another order, or other samples", "sample 1000")),
        ({"content": True}, ("other content", "sample 17 has another input")),
        ({"tokenizer": "two"}, ("another vocabulary", "tokenizer")),
    ],
)
def test_other_data_behind_the_same_recipe(
    change: Tree, words: tuple[str, ...], recipe: Tree, tmp_path: Path
) -> None:
    made = kdcore.cache(recipe, out=tmp_path / "cache")
    kdcore.run(cached(recipe, made), out=tmp_path / "fine")
    flip(recipe, **change)
    refused(cached(recipe, made), tmp_path, *words)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("teacher.main.args", {"hidden": [17]}, ("another teacher", "params.args.hidden.0: 16 -> 17")),
        ("teacher.main.model", "kdcore.zoo:conv_net", ("another teacher", "params.model")),
        ("teacher.main.modle", "kdcore.zoo:mlp", ("teacher.main.modle", "did you mean 'model'?")),
        ("teacher.main.weights", "0123", ("another teacher", "weights")),
        ("teacher.main.train", {"epochs": 3}, ("another teacher", "train")),
        ("teacher.main.view", {"input": "other"}, ("another view",)),
        ("data.args", {"count": 39}, ("other data", "args.count", "samples.main: 40 -> 39")),
        ("train.precision", "bf16", ("another precision", "'fp32' -> 'bf16'")),
    ],
)
def test_another_recipe(key: str, value: Any, words: tuple[str, ...], recipe: Tree, tmp_path: Path) -> None:
    tree = cached(recipe, kdcore.cache(recipe, out=tmp_path / "cache"))
    *steps, last = key.split(".")
    node = tree
    for step in steps:
        node = node[step]
    node[last] = value
    if "view" in key:
        tree["data"]["source"] = recipe["data"]["source"]
    refused(tree, tmp_path, *words)


def test_a_teacher_trained_with_another_seed(tiny: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(tiny, out=tmp_path / "cache", seed=1)
    refused(cached(tiny, made), tmp_path, "another teacher", "seed: 1 -> 0")
    kdcore.run(cached(tiny, made), out=tmp_path / "fine", seed=1)


def test_another_file_of_weights_under_the_same_name(recipe: Tree, tmp_path: Path) -> None:
    from kdcore.zoo import mlp

    file = tmp_path / "teacher.safetensors"
    save_tensors(file, mlp(hidden=(16,)).state_dict())
    recipe["teacher"]["main"]["checkpoint"] = str(file)
    made = kdcore.cache(recipe, out=tmp_path / "cache")
    moved = file.rename(tmp_path / "moved.safetensors")
    tree = cached(recipe, made)
    kdcore.run(tree, out=tmp_path / "gone")  # the teacher itself is no longer needed
    tree["teacher"]["main"]["checkpoint"] = str(moved)
    kdcore.run(tree, out=tmp_path / "elsewhere")
    save_tensors(moved, mlp(hidden=(16,)).state_dict())
    refused(tree, tmp_path, "another teacher", "params.checkpoint")


def test_a_top_k_of_another_temperature(recipe: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(recipe, out=tmp_path / "cache", codec="topk", k=5)
    tree = cached(recipe, made)
    kdcore.run(tree, out=tmp_path / "fine")
    tree["loss"][0]["temperature"] = 2.0
    refused(tree, tmp_path, "another temperature", "4 -> 2")
    tree["loss"] = [{"use": "pld"}]
    refused(tree, tmp_path, "loss pld", "needs all logits", "--codec full")


def test_a_top_k_of_other_classes(recipe: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(recipe, out=tmp_path / "cache", codec="topk", k=5)
    tree = cached(recipe, made)
    tree["student"]["args"]["classes"] = 12
    refused(tree, tmp_path, "the student has 12 classes, the cached teacher 10")


def test_what_the_cache_does_not_keep(recipe: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(recipe, out=tmp_path / "cache")
    tree = cached(recipe, made)
    tree["loss"].append({"use": "classics.fitnet", "reads": {"teacher": {"feature": "hidden0"}}})
    refused(tree, tmp_path, "hidden0")


NOISE = """
    import torch
    from kdcore.kinds import Augmentation

    class Noise(Augmentation):
        '''Adds noise.'''
        def __init__(self, *, size: float = 0.1):
            super().__init__()
            self.size = size

        def forward(self, batch):
            changed = batch.copy()
            changed["input"] = batch["input"] + self.size * torch.randn(64, generator=self.run.generator)
            return changed

    class Learned(Noise):
        '''Learns its noise.'''
        own_optimizer = {"use": "SGD", "lr": 0.1}
"""
PLUGIN = """
    from kdcore import Component, hookimpl

    @hookimpl
    def kd_augmentations():
        yield Component("noise", "MODULE:Noise", "noise")
        yield Component("noise.learned", "MODULE:Learned", "noise")
"""


def test_augmentations(
    recipe: Tree, tmp_path: Path, install: Callable[..., Any], write_module: Callable[..., str]
) -> None:
    install("noise", PLUGIN.replace("MODULE", write_module(NOISE)))
    plain = kdcore.cache(recipe, out=tmp_path / "plain")
    recipe["augmentation"] = [{"use": "noise"}]
    refused(cached(recipe, plain), tmp_path, "another augmentation", "tables.0.use: None -> 'noise'")
    noisy = kdcore.cache(recipe, out=tmp_path / "noisy")
    kdcore.run(cached(recipe, noisy), out=tmp_path / "fine")
    tree = cached(recipe, noisy)
    for key, value, word in (
        ("seed", 1, "seed: 0 -> 1"),
        ("augmentation", [], "tables"),
        ("augmentation", [{"use": "noise", "size": 0.2}], "tables"),
        ("data", {**tree["data"], "batch_size": 8}, "batch_size: 16 -> 8"),
    ):
        refused({**tree, key: value}, tmp_path, "another augmentation", word)
    with pytest.raises(InputError, match="the run has 3 steps, the cache 2"):
        kdcore.run({**tree, "train": {"steps": 3}}, out=tmp_path / "longer")
    recipe["augmentation"] = [{"use": "noise.learned"}]
    with pytest.raises(InputError, match="depends on the training"):
        kdcore.cache(recipe, out=tmp_path / "learned")


def test_a_sample_that_the_teacher_never_saw(recipe: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(recipe, out=tmp_path / "cache")
    batch = Batch({"id": torch.tensor([500]), "input": torch.zeros(1, 64)})
    with pytest.raises(InputError, match="sample 500 is not in the cache"):
        made.find(batch)
    batch["id"] = torch.tensor([5])
    with pytest.raises(InputError, match="sample 5 has another input than the teacher was asked about"):
        made.find(batch)


def test_a_k_that_leaves_no_rest_is_refused_before_the_teacher_is_trained(tiny: Tree, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not leave a rest"):
        kdcore.cache(tiny, out=tmp_path / "cache", codec="topk", k=50)
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_cached(recipe: Tree, tmp_path: Path) -> None:
    for change, words in (
        ({"teacher": {"main": {"use": "self"}}}, "changes during a run"),
        ({"teacher": {}, "loss": []}, "the recipe has no teacher"),
        ({"loss": []}, "no loss and no router of the recipe reads it"),
    ):
        with pytest.raises(InputError, match=words):
            kdcore.cache({**recipe, **change}, out=tmp_path / "cache")
    recipe["loss"].append({"use": "kd", "temperature": 1.0})
    with pytest.raises(InputError, match="several temperatures"):
        kdcore.cache(recipe, out=tmp_path / "cache", codec="topk", k=5)


def test_another_folder_is_left_alone(recipe: Tree, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty, and no cache"):
        kdcore.cache(recipe, out=tmp_path / "mine")
    kdcore.cache(recipe, out=tmp_path / "cache")
    recipe["teacher"]["main"]["args"] = {"hidden": [17]}
    with pytest.raises(InputError, match=re.escape("teacher.params.args.hidden.0: 16 -> 17")):
        kdcore.cache(recipe, out=tmp_path / "cache")
    with pytest.raises(InputError, match="no cache here"):
        Cache(tmp_path / "mine")


def test_keys_see_every_bit_that_was_read() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 3, 5, generator=draw)
    batch = Batch({"id": torch.arange(64), "input": inputs, "text": [str(i) for i in range(64)]})
    keys = row_keys(batch, ["input", "text"])
    assert len(keys.unique()) == 64
    assert torch.equal(keys, row_keys(batch, ["text", "input"]))
    assert torch.equal(keys[:7], row_keys(batch.rows(torch.arange(7)), ["input", "text"]))
    for change in (
        {"id": torch.arange(64) + 64},
        {"input": -inputs},
        {"input": inputs.flip(1)},
        {"input": inputs.transpose(1, 2).contiguous()},
        {"input": inputs.double()},
        {"text": ["x"] * 64},
    ):
        assert not bool((row_keys(Batch({**batch, **change}), ["input", "text"]) == keys).any())
    for bit in range(32):  # any single bit of any value, the sign among them
        flipped = inputs.clone().view(torch.int32)
        flipped[:, 1, 2] ^= torch.tensor(1 << bit).to(torch.int32)
        other = row_keys(Batch({**batch, "input": flipped.view(torch.float32)}), ["input", "text"])
        assert not bool((other == keys).any())


def test_a_watched_batch_notes_what_is_read() -> None:
    values = {"id": torch.arange(2), "a": torch.ones(2), "b": torch.ones(2)}
    watched = Watched(Batch(values))
    assert (len(watched), watched["a"].sum(), watched.get("none"), "b" in watched) == (2, 2, None, True)
    assert watched.read - {"id"} == {"a"}
    for take_all in (lambda w: dict(**w), lambda w: list(w), lambda w: w.copy(), lambda w: w.to("cpu")):
        watched = Watched(Batch(values))
        take_all(watched)
        assert watched.read == {"id", "a", "b"}
    watched = Watched(Batch(values))
    assert (watched.pop("a").sum(), watched.setdefault("b").sum(), watched.pop("none", 7)) == (2, 2, 7)
    assert watched.read >= {"a", "b"}


def test_files_in_lists_and_long_texts_among_the_parameters(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("1")
    params = {"files": [str(tmp_path / "one.txt")], "prompt": "Say it. " * 100}
    before = files_of(params)
    (tmp_path / "one.txt").write_text("2")
    assert list(before) == ["files.0"]
    assert before != files_of(params)


def test_files_and_folders_are_known_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "weights").write_text("1")
    params = {"folder": "teacher", "nested": {"none": "mlp", "count": 3}}
    before = files_of(params)
    assert list(before) == ["folder"]
    (tmp_path / "teacher" / "weights").write_text("2")
    assert files_of(params) != before


def test_a_digest_takes_what_is_no_tensor_in_a_state_dict() -> None:
    """Quantised layers keep packed weights there, other modules an extra state."""
    tree = {"a": (torch.ones(2), {"scale": 2.0}), "b": None}
    found = tensors_digest(tree)
    assert found == tensors_digest(copy.deepcopy(tree))
    for other in ((torch.zeros(2), {"scale": 2.0}), (torch.ones(2), {"scale": 3.0})):
        assert tensors_digest({**tree, "a": other}) != found


@pytest.mark.parametrize("option", [{"codec": "top-k"}, {"dtype": "bf16"}, {"codec": "topk", "mass": 90}])
def test_options_that_are_none(option: Tree, tmp_path: Path, recipe: Tree) -> None:
    with pytest.raises(InputError, match=next(name for name in ("dtype", "mass", "codec") if name in option)):
        kdcore.cache(recipe, out=tmp_path / "cache", **option)
