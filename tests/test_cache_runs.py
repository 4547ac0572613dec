"""The same recipe live and cached: the same losses and the same student."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kdcore.caching import Cache, log_error
from kdcore.checkpoint import load_tensors
from kdcore.errors import RunError
from kdcore.shipping import load_student, load_teachers

Tree = dict[str, Any]

MODULE = """
    import torch
    from torch import nn
    from kdcore import Data, Outputs, Unembed
    from kdcore.datasets import TensorSet

    def text(vocab: int = 80, block: int = 12):
        draw = torch.Generator().manual_seed(0)
        def some(first, count):  # blocks of several lengths: what follows a block's end is no target
            tokens = torch.randint(vocab, (count, block), generator=draw)
            length = torch.randint(3, block + 1, (count, 1), generator=draw)
            target = tokens.roll(-1, 1).masked_fill(torch.arange(block) >= length - 1, -100)
            return TensorSet(torch.arange(first, first + count), tokens=tokens, target=target)
        return Data(some(100, 72), some(0, 20), some(50, 20), classes=vocab, tokenizer=f"drawn {vocab}")

    class Reader(nn.Module):
        def __init__(self, width: int, scale: float, unembed: bool, vocab: int):
            super().__init__()
            self.embed = nn.Embedding(vocab, width)
            self.mix = nn.GRU(width, width, batch_first=True)
            self.out = nn.Linear(width, vocab)
            self.scale, self.unembed = scale, unembed

        def forward(self, tokens, target):
            hidden = self.scale * self.mix(self.embed(tokens))[0]
            whole = Unembed(hidden, self.out.weight, self.out.bias)
            said = Outputs(mask=target != -100, target=target)
            if self.unembed:
                said.unembed = whole
            else:
                said.logits = whole.logits()
            return said

    def reader(*, width: int = 16, scale: float = 1.0, unembed: bool = False, vocab: int = 80):
        return Reader(width, scale, unembed, vocab)
"""


@pytest.fixture
def tokens(write_module: Callable[..., str]) -> Tree:
    """A recipe of tokens, some of them no target, whose teacher is sure of itself."""
    module, inputs = write_module(MODULE), ["tokens", "target"]
    model = {"use": "module", "model": f"{module}:reader", "inputs": inputs}
    return {
        "name": "tokens",
        "data": {"source": f"{module}:text", "batch_size": 16},
        "teacher": {"main": {**model, "args": {"width": 32, "scale": 12.0}}},
        "student": {**model, "args": {"width": 8}},
        "task": {"use": "language", "metrics": ["loss"]},
        "loss": [{"use": "kd", "temperature": 2.0}],
        "train": {"steps": 9, "optimizer": {"use": "AdamW", "lr": 1e-2}},
    }


def cached(tree: Tree, path: Path, name: str = "main") -> Tree:
    """The recipe with the teacher's ``use`` and ``path`` changed, and nothing else."""
    changed = copy.deepcopy(tree)
    changed["teacher"][name] |= {"use": "cached", "path": str(path)}
    return changed


def plugin(kind: str, **targets: str) -> str:
    """A light module that offers these components."""
    rows = [f"    yield Component({name!r}, {target!r}, 'a test')" for name, target in targets.items()]
    head = ["from kdcore import Component, hookimpl", "@hookimpl", f"def kd_{kind}():"]
    return "\n".join([*head, *rows])


def losses(folder: Path) -> list[dict[str, float]]:
    rows = [
        json.loads(row)
        for row in next(folder.glob("stages/*/student/metrics.jsonl")).read_text().splitlines()
    ]
    return [{k: v for k, v in row.items() if "loss" in k or k in ("kd", "task")} for row in rows]


def student(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def distance(one: Path, other: Path) -> float:
    """Relative L2 of the weights."""
    a, b = (load_tensors(folder / "student.safetensors", "") for folder in (one, other))
    square = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return math.sqrt(square / sum(float(value.square().sum()) for value in a.values()))


def both(tree: Tree, folder: Path, **options: Any) -> tuple[Path, Path]:
    live = kdcore.run(tree, out=folder / "live").folder
    made = kdcore.cache(tree, out=folder / "cache", **options)
    return live, kdcore.run(cached(tree, made.folder), out=folder / "cached").folder


def test_digits_cached_in_full_is_the_same_run(tiny: Tree, tmp_path: Path) -> None:
    live, again = both(tiny, tmp_path)
    assert losses(live)
    assert losses(live) == losses(again)
    assert student(live) == student(again)


def test_a_convolutional_teacher_is_the_same_run(tiny: Tree, tmp_path: Path) -> None:
    tiny["data"]["args"]["flat"] = False
    tiny["teacher"]["main"] = {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"width": 8}}
    live, again = both(tiny, tmp_path)
    assert student(live) == student(again)


def test_tokens_cached_in_full_are_the_same_run(tokens: Tree, tmp_path: Path) -> None:
    live, again = both(tokens, tmp_path)
    assert losses(live) == losses(again)
    assert student(live) == student(again)


def test_a_language_model_cached_in_full_is_the_same_run(tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    llama = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 32, **layers}
    tree = {
        "data": {"source": "kd_plugin_hf.data:text", "args": {"vocab": 300, "block": 32}, "batch_size": 256},
        "teacher": {"main": {"use": "hf", "config": {**llama, "hidden_size": 16, "intermediate_size": 32}}},
        "student": {"use": "hf", "config": {**llama, "hidden_size": 8, "intermediate_size": 16}},
        "task": {"use": "language", "metrics": ["loss"]},
        "loss": [{"use": "divergences.js"}],
        "train": {"steps": 3},
    }
    live, again = both(tree, tmp_path)
    assert student(live) == student(again)


def test_hidden_states_with_the_output_layer_are_the_same_run(tokens: Tree, tmp_path: Path) -> None:
    tokens["task"] = {"use": "none"}  # a plain module's teacher without logits is not judged
    for side in (tokens["teacher"]["main"], tokens["student"]):
        side["args"]["unembed"] = True
    live, again = both(tokens, tmp_path)
    assert student(live) == student(again)
    header = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert header["layout"]["shapes"] == {"hidden": [12, 32], "mask": [12]}
    head = tmp_path / "cache" / "head.safetensors"
    whole = head.read_bytes()
    head.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match="other bytes"):
        Cache(tmp_path / "cache").decoded(torch.arange(2))
    kdcore.cache(tokens, out=tmp_path / "cache")
    assert head.read_bytes() == whole


def test_a_finished_run_needs_its_cache_no_more(tiny: Tree, tmp_path: Path) -> None:
    """``kd bench`` and probes look for teachers that can be asked; a cached one is none."""
    kdcore.cache(tiny, out=tmp_path / "cache")
    kdcore.run(cached(tiny, tmp_path / "cache"), out=tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    assert load_teachers(load_student(tmp_path / "run")[1]) == {}


@pytest.mark.parametrize("unembed", [False, True])
def test_a_top_k_differs_by_no_more_than_it_says(unembed: bool, tokens: Tree, tmp_path: Path) -> None:
    """79 of 80 classes leave nothing open: what is left is the error of the codes, ``log_error`` at most."""
    tokens["task"] = {"use": "none"}
    for side in (tokens["teacher"]["main"], tokens["student"]):
        side["args"] = {"width": 16, "unembed": unembed}
    live, again = both(tokens, tmp_path, codec="topk", k=79)
    exact, coded = (
        next(row["kd"] for row in losses(folder) if "kd" in row) / 4.0 for folder in (live, again)
    )
    # every log p, none below -8, is wrong by d at most, and by 2 d after all are scaled to sum to one:
    # |KL' - KL| <= (e^2d - 1) sum p |log p - log q| + 2 d, and here |log p - log q| < 3
    d = log_error(-8.0, head=False)
    assert 0 < abs(exact - coded) <= math.expm1(2 * d) * 3 + 2 * d


def test_a_small_top_k_gives_nearly_the_same_student(tokens: Tree, tmp_path: Path) -> None:
    live, again = both(tokens, tmp_path, codec="topk", k=24)
    alone = kdcore.run({**tokens, "loss": []}, out=tmp_path / "alone").folder
    assert distance(live, again) < 0.3 * distance(live, alone)
    made = kdcore.cache(tokens, out=tmp_path / "mass", codec="topk", k=64, mass=0.95)
    again = kdcore.run(cached(tokens, made.folder), out=tmp_path / "of-mass").folder
    assert distance(live, again) < 0.3 * distance(live, alone)


def test_rounded_logits_give_nearly_the_same_student(tiny: Tree, tmp_path: Path) -> None:
    live, again = both(tiny, tmp_path, dtype="float16")
    assert 0 < distance(live, again) < 1e-3


def test_the_other_keys_of_the_teacher_may_go(tiny: Tree, tmp_path: Path) -> None:
    live = kdcore.run(tiny, out=tmp_path / "live").folder
    made = kdcore.cache(tiny, out=tmp_path / "cache")
    tiny["teacher"]["main"] = {"use": "cached", "path": str(made.folder)}
    assert student(kdcore.run(tiny, out=tmp_path / "a").folder) == student(live)
    tiny["teacher"]["main"]["weights"] = made.header["teacher"]["weights"]
    assert student(kdcore.run(tiny, out=tmp_path / "b").folder) == student(live)


def test_other_seeds_and_batch_sizes_read_the_same_cache(tiny: Tree, tmp_path: Path) -> None:
    tiny["teacher"]["main"].pop("train")
    made = kdcore.cache(tiny, out=tmp_path / "cache")
    tree = cached(tiny, made.folder)
    for name, change in {"seed": {"seed": 3}, "batch": {"data": {**tiny["data"], "batch_size": 7}}}.items():
        kdcore.run({**tree, **change}, out=tmp_path / name)


def test_tapped_modules_are_cached(
    tiny: Tree, tmp_path: Path, install: Callable[..., Any], write_module: Callable[..., str]
) -> None:
    code = """
        import torch.nn.functional as F
        from torch import nn
        from kdcore.kinds import Loss

        class Hint(Loss):
            '''A projection of the student's features to the teacher's.'''
            reads = ("student.feature", "teacher.feature", "teacher.before")

            def setup(self):
                student, teacher = self.run.preview(self)
                self.project = nn.Linear(student["feature"].shape[1], teacher["feature"].shape[1])

            def forward(self, student, teacher, batch):
                mine = self.project(student["feature"])
                return F.mse_loss(mine, teacher["feature"], reduction="none").mean(1) + teacher["before"].mean(1)
    """
    install("hint", plugin("losses", hint=f"{write_module(code)}:Hint"))
    paths = {"student": {"feature": "hidden0"}, "teacher": {"feature": "hidden0", "before": "head.in"}}
    tiny["loss"].append({"use": "hint", "reads": paths})
    live, again = both(tiny, tmp_path)
    assert student(live) == student(again)


@pytest.mark.parametrize("changes", [True, False])
def test_augmented_samples_are_cached_step_by_step(
    changes: bool, tiny: Tree, tmp_path: Path, install: Callable[..., Any], write_module: Callable[..., str]
) -> None:
    code = """
        import torch
        from kdcore.kinds import Augmentation

        class Noise(Augmentation):
            '''Adds noise to the inputs, or smooths nothing at all.'''
            def __init__(self, *, size: float = 0.1):
                super().__init__()
                self.size = size

            def forward(self, batch):
                changed = batch.copy()
                drawn = torch.randn(batch["input"].shape, generator=self.run.generator)
                changed["input"] = batch["input"] + self.size * drawn
                return changed

        class Quiet(Noise):
            '''Changes the labels alone.'''
            changes_inputs = False
            changes_labels = True

            def forward(self, batch):
                changed = batch.copy()
                changed["target"] = (batch["target"] + 1) % 10
                return changed
    """
    module = write_module(code)
    targets = {"noise": f"{module}:Noise", "noise.quiet": f"{module}:Quiet"}
    install("noise", plugin("augmentations", **targets))
    tiny["augmentation"] = [{"use": "noise" if changes else "noise.quiet", "size": 0.3}]
    live, again = both(tiny, tmp_path)
    assert student(live) == student(again)
    rows = 2 * 100 + 2 * 4 if changes else 100  # two epochs, and the sample as it is and augmented
    assert len(Cache(tmp_path / "cache")) == rows


def test_data_that_augment_themselves_are_cached_by_epoch(
    tiny: Tree, tmp_path: Path, write_module: Callable[..., str]
) -> None:
    module = write_module("""
        import torch
        from kdcore.datasets import digits

        class Shifted:
            def __init__(self, data):
                self.data = data

            def __len__(self):
                return len(self.data)

            def __getitem__(self, index):
                return self.data[index]

            def augment(self, item, rng):
                return {**item, "input": item["input"] + float(rng.normal()) * 0.2}

        def two_streams(labels: int = 60):
            data = digits(labels=labels, flat=True)
            data.train = {"plain": digits(labels=20, flat=True).train, "shifted": Shifted(data.train)}
            return data
    """)
    tiny["data"] = {"source": f"{module}:two_streams", "batch_size": 16, "epoch": "shifted"}
    live, again = both(tiny, tmp_path)
    assert student(live) == student(again)


def test_two_teachers_of_which_one_is_cached(tiny: Tree, tmp_path: Path) -> None:
    tiny["teacher"]["other"] = {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [12]}}
    live = kdcore.run(tiny, out=tmp_path / "live").folder
    made = kdcore.cache(tiny, teacher="other", out=tmp_path / "cache")
    again = kdcore.run(cached(tiny, made.folder, "other"), out=tmp_path / "cached").folder
    assert student(live) == student(again)


def test_mixed_precision_is_the_same_run(tiny: Tree, tmp_path: Path) -> None:
    tiny["train"]["precision"] = "bf16"
    live, again = both(tiny, tmp_path)
    assert student(live) == student(again)


def test_micro_batches_read_a_cache(tiny: Tree, tmp_path: Path) -> None:
    tiny["train"]["accumulate"] = 4
    live, again = both(tiny, tmp_path)
    assert distance(live, again) < 1e-5
