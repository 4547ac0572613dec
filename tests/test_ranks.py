"""Two processes give the result of one; one that is killed ends all; a run goes on with another number of them."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import kdcore
from kdcore.checkpoint import load_tensors

FIT = "stages/distill/student"
TOLERANCE = 2e-6  # weights are of order 0.1 to 1: roundings of float32 over some 8 steps
TOKENS = """
    import torch
    from torch import nn
    from kdcore.types import Data
    from kdcore.datasets import TensorSet

    def documents():
        '''Sequences of very different length, so that a mean of means would differ from the mean.'''
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 12, (40, 10), generator=rng)
        target = torch.roll(tokens, -1, 1)
        target[torch.arange(10)[None, :] >= torch.randint(1, 11, (40, 1), generator=rng)] = -100
        short = target.clone()
        short[::3, 2:] = -100
        sets = [TensorSet(torch.arange(a, b), input=tokens[a:b], target=target[a:b], short=short[a:b])
                for a, b in ((0, 24), (24, 32), (32, 40))]
        return Data(*sets, classes=12)

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed, self.head = nn.Embedding(12, width), nn.Linear(width, 12)
            self.unused = nn.Linear(2, 2)  # no gradient anywhere: weight decay must not move it
        def forward(self, tokens):
            return self.head(torch.tanh(self.embed(tokens)))

    def net(*, width: int = 8):
        return Net(width)
"""


def images(**train: Any) -> dict[str, Any]:
    """SGD does not amplify rounding as Adam's division does, so equality can be asked for tightly."""
    return {
        "name": "images",
        "data": {"source": "kdcore.datasets:digits", "args": {"labels": 100, "flat": True}, "batch_size": 32},
        "teacher": {"main": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [16]}}},
        "student": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [8]}},
        "loss": [{"use": "kd", "temperature": 4.0, "weight": 0.9}],
        "train": {
            "epochs": 2,
            "optimizer": {"use": "SGD", "lr": 0.1, "momentum": 0.9},
            "checkpoint_every": 3,
            **train,
        },
    }


def equal() -> dict[str, dict[str, Any]]:
    """Equal global batches in unequal shares: the last one has 4 of 32 samples, tokens are ragged."""
    reads = {"student": {"embedding": "hidden0"}, "teacher": {"embedding": "hidden0"}}
    crd = {"use": "classics.crd", "negatives": 16, "dim": 8, "weight": 0.1, "reads": reads}
    coupled = images()  # relations over the whole batch, and a memory bank that every rank must hold alike
    coupled["loss"] += [{"use": "classics.rkd", "reads": reads}, crd]
    coupled["data"]["batch_size"] = 25
    trained = images()
    trained["teacher"]["main"]["train"] = {"epochs": 1}
    tokens = images(optimizer={"use": "SGD", "lr": 0.5, "weight_decay": 0.1}, accumulate=2)
    tokens["data"] = {"source": "ranks_parts:documents", "batch_size": 8}
    tokens["teacher"]["main"] = {"use": "module", "model": "ranks_parts:net", "args": {"width": 16}}
    tokens["student"] = {"use": "module", "model": "ranks_parts:net"}
    tokens["task"] = {"use": "language", "weight": 0.5}
    viewed = copy.deepcopy(tokens)
    viewed["student"]["view"] = {"target": "short"}
    return {"images": trained, "coupled": coupled, "tokens": tokens, "viewed": viewed}


def refused() -> dict[str, dict[str, Any]]:
    norm, small = images(), images()
    norm["data"]["args"]["flat"] = False
    norm["student"] = {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"width": 4}}
    norm["teacher"]["main"] = {"use": "module", "model": "kdcore.zoo:conv_net", "args": {"norm": "group"}}
    small["data"]["batch_size"] = 33  # 100 = 3 * 33 + 1
    return {"norm": norm, "small": small}


@pytest.fixture(scope="module")
def done(ranks: Any) -> Any:
    """Everything that two processes do here, in one go; each recipe of ``equal`` by one process, too."""
    ranks.module("ranks_parts", TOKENS)
    for name, recipe in {**equal(), **refused()}.items():
        ranks.add(name, recipe)
    for name in ("again", "fewer"):
        ranks.add(f"{name}-1", images(), stop=5)
    ranks.add("again-2", images(), resume="again-1")
    ranks.stopped("more-1", images(), 5)
    ranks.add("more-2", images(), resume="more-1")
    ranks.add("whole", images())
    ranks.run()
    for name in (*equal(), "whole"):
        kdcore.run(ranks.folder / f"{name}.toml", out=ranks.folder / f"{name}-one")
    return ranks


def distance(left: Path, right: Path) -> float:
    a, b = (load_tensors(folder / FIT / "weights.safetensors", "test") for folder in (left, right))
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize("name", ["images", "coupled", "tokens", "viewed"])
def test_two_processes_give_the_result_of_one(name: str, done: Any) -> None:
    assert done.error(name) == ""
    assert distance(done.folder / f"{name}-one", done.out(name)) < TOLERANCE


def test_the_distance_is_able_to_fail(done: Any) -> None:
    assert distance(done.out("tokens"), done.out("viewed")) > 1e-3


def test_batch_norm_in_training_is_refused_with_the_remedy(done: Any) -> None:
    said = done.error("norm")
    assert said.startswith("2 ")
    assert "batch statistics" in said
    assert "group" in said


def test_a_batch_that_leaves_a_process_without_samples_is_refused(done: Any) -> None:
    said = done.error("small")
    assert said.startswith("2 ")
    assert "a batch of 1 of 100 samples is too small for 2 processes" in said
    assert not done.out("small").exists()


def test_a_signal_to_one_process_saves_and_ends_both(done: Any) -> None:
    for rank, who in ((0, "another rank"), (1, "SIGTERM")):
        said = (done.folder / f"fewer-1.error{rank}").read_text("utf-8")
        assert said.startswith(f"3 stopped by {who} at step 5 of 8; the state is saved\n  hint    kd resume ")


def test_two_processes_go_on_with_the_same_bits(done: Any, digest: Callable[[Path], dict[str, str]]) -> None:
    assert done.error("again-2") == ""
    assert digest(done.out("again-1")) == digest(done.out("whole"))


def test_one_process_goes_on_where_two_left(done: Any) -> None:
    """Not the same bits: sums over two shares round otherwise. The same run to float tolerance."""
    kdcore.run(images(), out=done.out("fewer-1"), resume=True)
    assert distance(done.out("fewer-1"), done.folder / "whole-one") < TOLERANCE


def test_two_processes_go_on_where_one_left(done: Any) -> None:
    assert done.error("more-2") == ""
    assert distance(done.out("more-1"), done.folder / "whole-one") < TOLERANCE


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_all_and_the_run_goes_on(
    which: int, tmp_path: Path, torchrun_line: Callable[..., list[str]]
) -> None:
    """SIGKILL of either process, one of which writes the states: words, a code, nobody left, and a resume."""
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(tomli_w.dumps(images(epochs=150, checkpoint_every=20)), "utf-8")
    command = ["-m", "kdcore", "run", str(recipe), "--out", str(out), "--quiet"]
    starter = subprocess.Popen(
        torchrun_line(2, *command),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    states, deadline = out / FIT / "state", time.monotonic() + 120
    while not list(states.glob("*.state")):
        assert starter.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = by_rank(starter.pid)
    os.kill(workers[which], signal.SIGKILL)
    said = starter.communicate(timeout=120)[1]
    assert starter.returncode not in (0, None)
    assert "error: another process of this run is gone" in said
    assert "kd resume" in said
    assert "Traceback (most recent call last):\n[rank" not in said
    assert not [pid for pid in workers.values() if Path(f"/proc/{pid}").exists()]
    assert not (out / FIT / "result.json").exists()  # it was killed before its end
    resumed = kdcore.run(recipe, out=out, resume=True)
    assert resumed.results["student"]["steps"] == 600
    assert distance(out, kdcore.run(recipe, out=tmp_path / "whole").folder) < 1e-4  # after 600 steps


def by_rank(starter: int) -> dict[int, int]:
    """The process numbers of a torchrun's workers, by their rank."""
    found = {}
    for pid in Path(f"/proc/{starter}/task/{starter}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        for entry in environment:
            if entry.startswith("RANK="):
                found[int(entry.removeprefix("RANK="))] = int(pid)
    return found
