"""A student in pieces over two processes trains as it does whole in one; what cannot be done so is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kdcore
from kdcore.checkpoint import load_tensors
from kdcore.errors import InputError
from kdcore.sharding import UNIT, _units

FIT = "stages/distill/student"
WIDE = [
    260,
    260,
    260,
]  # 260 * 261 = 67,860 parameters a layer: above UNIT, so that inner layers are cut apart
MODULE = """
    import torch
    from torch import nn
    from kdcore.types import Data, Outputs
    from kdcore.datasets import TensorSet, digits

    def documents():
        '''Sequences of very different length: two processes never hold the same number of tokens.'''
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 12, (40, 10), generator=rng)
        target = torch.roll(tokens, -1, 1)
        target[torch.arange(10)[None, :] >= torch.randint(1, 11, (40, 1), generator=rng)] = -100
        sets = [TensorSet(torch.arange(a, b), input=tokens[a:b], input_ids=tokens[a:b], target=target[a:b])
                for a, b in ((0, 24), (24, 32), (32, 40))]
        return Data(*sets, classes=12)

    def streams():
        '''40 labelled digits beside 60 without labels.'''
        data = digits(labels=100, flat=True)
        values = {name: value for name, value in data.train.values.items()}
        first = {name: value[:40] for name, value in values.items()}
        rest = {name: value[40:] for name, value in values.items() if name != "target"}
        data.train = {"labelled": TensorSet(first.pop("id"), **first), "free": TensorSet(rest.pop("id"), **rest)}
        return data

    class Language(nn.Module):
        '''Shares its embedding's weight with the output layer.'''
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Embedding(12, width)
            self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
            self.scale = nn.Parameter(torch.tensor(1.0))  # no axis to cut
        def forward(self, tokens):
            return Outputs(logits=self.scale * self.body(self.embed(tokens)) @ self.embed.weight.T)

    class Block(nn.Module):
        def __init__(self, inputs, width):
            super().__init__()
            self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        def forward(self, x):
            return x + self.second(torch.relu(self.first(x)))

    def blocks(*, width: int = 260):
        layers = [nn.Linear(64, width), Block(width, width), Block(width, width), nn.Linear(width, 10)]
        return nn.Sequential(*layers)

    def language(*, width: int = 260):
        return Language(width)
"""


def images(**train: Any) -> dict[str, Any]:
    """SGD does not amplify rounding as Adam's division does, so equality can be asked for tightly."""
    return {
        "name": "images",
        "data": {"source": "kdcore.datasets:digits", "args": {"labels": 100, "flat": True}, "batch_size": 32},
        "teacher": {"main": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": WIDE}}},
        "student": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": WIDE}},
        "loss": [{"use": "kd", "temperature": 4.0, "weight": 0.9}],
        "train": {
            "epochs": 2,
            "optimizer": {"use": "SGD", "lr": 0.1, "momentum": 0.9},
            "strategy": "fsdp",
            **train,
        },
    }


def made(module: str) -> dict[str, dict[str, Any]]:
    """The recipes, each with something that pieces could get wrong."""
    best = images(clip=0.05, keep="best")
    best["teacher"]["main"] |= {"train": {"epochs": 1}, "shard": True}

    # gradient that begins inside a layer and never comes from its output; a projector, which is not cut
    tapped = images(accumulate=2)
    tapped["student"]["model"] = tapped["teacher"]["main"]["model"] = f"{module}:blocks"
    del tapped["student"]["args"], tapped["teacher"]["main"]["args"]
    reads = {"student": {"feature": "1.first"}, "teacher": {"feature": "2.second"}}
    tapped["loss"] = [{"use": "classics.fitnet", "relu": False, "weight": 0.01, "reads": reads}]
    tapped["task"] = {"weight": 0.0}
    tapped["teacher"]["main"]["shard"] = True

    ema = images(optimizer={"use": "AdamW", "lr": 1e-3, "eps": 1e-3})
    ema["teacher"]["main"] = {"use": "self", "decay": 0.9}

    tokens = images(optimizer={"use": "SGD", "lr": 0.5}, clip=1.0)
    tokens["data"] = {"source": f"{module}:documents", "batch_size": 8}
    tokens["teacher"]["main"] = {"use": "module", "model": f"{module}:language", "shard": True}
    tokens["student"] = {"use": "module", "model": f"{module}:language"}
    tokens["task"] = {"use": "language", "weight": 0.5}

    llama = {"model_type": "llama", "vocab_size": 12, "hidden_size": 128, "intermediate_size": 256}
    llama |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    hidden = images(steps=3)  # losses that compute with the weights of the output layer, after the forward
    del hidden["train"]["epochs"]
    hidden["data"] = tokens["data"]
    hidden["student"] = {"use": "hf", "config": {**llama, "tie_word_embeddings": True}, "unembed": True}
    hidden["teacher"]["main"] = {**hidden["student"], "shard": True}
    hidden["task"] = {"use": "language"}

    streams = images()
    streams["data"] = {"source": f"{module}:streams", "batch_size": 10, "forward": "separate"}
    streams["task"] = {"stream": "labelled"}
    return {
        "best": best,
        "tapped": tapped,
        "ema": ema,
        "tokens": tokens,
        "hidden": hidden,
        "streams": streams,
    }


TOLERANCE = 1e-6  # weights are of order 0.1: some 50 roundings of float32


@pytest.fixture(scope="module")
def both(ranks: Any) -> dict[str, tuple[Path, Path]]:
    """Every recipe run by one process and by two: the run folders."""
    ranks.module("fsdp_parts", MODULE)
    recipes = made("fsdp_parts")
    for name, recipe in recipes.items():
        ranks.add(name, recipe)
    for name in ("again", "fewer"):
        ranks.add(f"{name}-1", recipes["best"], stop=5)
    ranks.add("again-2", recipes["best"], resume="again-1")
    ranks.stopped("more-1", recipes["best"], 5)
    ranks.add("more-2", recipes["best"], resume="more-1")
    ranks.run()
    whole = {n: kdcore.run(ranks.folder / f"{n}.toml", out=ranks.folder / f"{n}-one") for n in recipes}
    return {name: (result.folder, ranks.out(name)) for name, result in whole.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / FIT / "weights.safetensors", "test")


def distance(left: Path, right: Path) -> float:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize("name", ["best", "tapped", "ema", "tokens", "hidden", "streams"])
def test_two_processes_with_pieces_give_the_result_of_one(name: str, both: Any, ranks: Any) -> None:
    assert ranks.error(name) == ""
    one, two = both[name]
    assert distance(one, two) < TOLERANCE


def test_two_processes_with_pieces_go_on_with_the_same_bits(
    both: Any, ranks: Any, digest: Callable[[Path], dict[str, str]]
) -> None:
    said = "3 stopped by another rank at step 5 of 8; the state is saved\n  hint    kd resume "
    assert ranks.error("again-1").startswith(said)
    assert ranks.error("again-2") == ""
    assert digest(ranks.out("again-1")) == digest(ranks.out("best"))


def test_one_process_goes_on_where_two_left_and_two_where_one_did(both: Any, ranks: Any) -> None:
    kdcore.run(ranks.folder / "best.toml", out=ranks.out("fewer-1"), resume=True)
    assert ranks.error("more-2") == ""
    for name in ("fewer-1", "more-1"):
        assert distance(both["best"][0], ranks.out(name)) < TOLERANCE


def test_weights_leave_as_one_plain_file(both: Any, ranks: Any) -> None:
    names = load_tensors(both["best"][0] / "student.safetensors", "test")
    found = load_tensors(ranks.out("best") / "student.safetensors", "test")
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in names.items()}


def test_layers_are_cut_apart_where_they_are_large_and_share_nothing() -> None:
    """Elements of a list of layers with UNIT parameters, inner ones first; the tied one stays with its parent."""
    width = 260
    model = nn.Module()
    model.embed = nn.Embedding(300, width)
    block = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 4))
    model.blocks = nn.ModuleList([block, nn.Linear(width, width), nn.Linear(4, 4), nn.Linear(width, 300)])
    model.blocks[3].weight = model.embed.weight
    assert width * (width + 1) >= UNIT
    units = list(_units(model))
    assert [id(unit) for unit in units] == [id(block[0]), id(model.blocks[1])]


OWN = """
    import torch
    from torch import nn
    from kdcore import Augmentation, Loss, Router

    class Noise(Augmentation):
        '''Learned noise with an optimiser of its own.'''
        own_optimizer = {"use": "Adam", "lr": 1e-2}
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(64))

    class Merging(Loss):
        '''Adds up the gradients of the terms itself.'''
        def forward(self, student, teacher, batch):
            return (student.logits - teacher.logits).square().sum(1)
        def merge(self, gradients):
            return [sum(g for g in each if g is not None) for each in zip(*gradients.values())]

    class Planned(Router):
        '''Asks each teacher about some samples only.'''
        def plan(self, batch, student):
            return torch.ones(len(batch), 1, dtype=torch.bool)
        def forward(self, batch, student, teachers):
            return torch.ones(len(batch), 1)

"""


@pytest.fixture
def own(install: Callable[..., Any], write_module: Callable[..., str]) -> None:
    module = write_module(OWN)
    install(
        "own",
        f"""
        from kdcore import Component, hookimpl
        @hookimpl
        def kd_augmentations():
            yield Component("own", "{module}:Noise")
        @hookimpl
        def kd_losses():
            yield Component("own.merging", "{module}:Merging")
        @hookimpl
        def kd_routers():
            yield Component("own.planned", "{module}:Planned")
    """,
    )


@pytest.mark.parametrize(
    ("table", "place", "words"),
    [
        ({"augmentation": [{"use": "own"}]}, "train.strategy", "augmentation.own steps its own"),
        ({"loss": [{"use": "own.merging"}]}, "train.strategy", "loss.own-merging merges them whole"),
        ({"router": {"use": "own.planned"}}, "teacher.main.shard", "plans which teachers run"),
    ],
)
def test_what_cannot_be_in_pieces_is_refused_before_the_run(
    table: dict[str, Any], place: str, words: str, own: None, tmp_path: Path
) -> None:
    """With one process, too: the recipe would fail where it is meant to run."""
    recipe = images()
    recipe["teacher"]["main"]["shard"] = True
    with pytest.raises(InputError, match=words) as caught:
        kdcore.run({**recipe, **table}, out=tmp_path / "run")
    assert (caught.value.place, caught.value.exit_code) == (place, 2)
    assert not (tmp_path / "run").exists()
    del recipe["teacher"]["main"]["shard"], recipe["train"]["strategy"]
    kdcore.check({**recipe, **table})
