"""Files of weights and state: written whole or not at all, loaded without running anything."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from torch import nn

from kdcore.checkpoint import (
    load_state,
    load_tensors,
    load_weights,
    newest_state,
    replacing,
    save_state,
    save_tensors,
    write_json,
)
from kdcore.errors import InputError, RunError


class Evil:
    """A pickle that would leave a file behind if anything ran it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes: what a full disk looks like to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "json": lambda path, size: write_json(path, "x" * size),
    "tensors": lambda path, size: save_tensors(path, {"w": torch.zeros(size)}),
    "state": lambda path, size: save_state(path, {"w": torch.zeros(size)}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_without_space_the_old_file_stays_and_nothing_else(
    kind: str, tmp_path: Path, full_disk: None
) -> None:
    path = tmp_path / "deep" / "file"
    path.parent.mkdir()
    path.write_text("before", "utf-8")
    with pytest.raises(RunError, match="cannot be written"):
        WRITERS[kind](path, 10_000)
    assert path.read_text("utf-8") == "before"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_replaces_the_old_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for _ in range(2):
        WRITERS[kind](path, 3)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("where", ["file/below/x", "/proc/kdcore/x", "/dev/null/x"])
def test_a_place_that_cannot_be_written_is_a_run_error(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    with pytest.raises(RunError, match="cannot be written"):
        write_json(tmp_path / where, 1)


def test_a_block_that_fails_leaves_the_old_file_and_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before", "utf-8")

    def halfway() -> None:
        with replacing(path) as draft:
            draft.write_text("half", "utf-8")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        halfway()
    assert (path.read_text("utf-8"), list(tmp_path.iterdir())) == ("before", [path])


def test_tensors_come_back_with_shared_storage_and_views(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "w.safetensors", {"a": whole, "b": whole, "c": whole.t()}, {"format": "pt"})
    found = load_tensors(tmp_path / "w.safetensors", "p")
    assert sorted(found) == ["a", "b", "c"]
    assert torch.equal(found["b"], whole)
    assert torch.equal(found["c"], whole.t())


def test_what_mmengine_writes_is_loaded_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = HistoryBuffer([1.0, 2.5], [1, 1])
    weights = nn.Linear(2, 2).state_dict()
    checkpoint = {
        "meta": {"epoch": 3, "seed": np.int64(5), "time": "now"},
        "state_dict": weights,
        "message_hub": {"log_scalars": {"train/loss": buffer}, "runtime_info": {"lr": np.float64(0.1)}},
        "optimizer": torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict(),
    }
    torch.save(checkpoint, tmp_path / "epoch_3.pth")
    monkeypatch.setattr(HistoryBuffer, "_statistics_methods", {})  # as in a process that made none yet
    found = load_tensors(tmp_path / "epoch_3.pth", "p")
    assert torch.equal(found["weight"], weights["weight"])
    whole = load_state(tmp_path / "epoch_3.pth")
    loaded = whole["message_hub"]["log_scalars"]["train/loss"]
    assert loaded.data[0].tolist() == [1.0, 2.5]
    assert loaded.statistics("mean") == 1.75


def test_of_getattr_only_the_statistics_of_a_history_buffer_are_there(tmp_path: Path) -> None:
    class Reach:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (HistoryBuffer, "__init__")

    torch.save({"w": Reach()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="HistoryBuffer"):
        load_tensors(tmp_path / "w.pt", "p")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_in_a_larger_file_are_found(key: str, tmp_path: Path) -> None:
    torch.save({key: {"w": torch.ones(2)}, "epoch": 4}, tmp_path / "w.pt")
    assert load_tensors(tmp_path / "w.pt", "p")["w"].tolist() == [1, 1]


def _truncated(path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])


def _flipped(path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path)
    raw = bytearray(path.read_bytes())
    raw[60:200:7] = bytes(b ^ 0xFF for b in raw[60:200:7])
    path.write_bytes(bytes(raw))


def _truncated_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-4])


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "absent": ("w.pt", lambda p: None, "no such checkpoint"),
    "a folder": ("w.pt", lambda p: p.mkdir(), "no such checkpoint"),
    "empty": ("w.pt", lambda p: p.write_bytes(b""), "damaged"),
    "noise": ("w.pt", lambda p: p.write_bytes(bytes(range(7, 107))), "damaged"),
    "text": ("w.pt", lambda p: p.write_text("hello world"), "damaged"),
    "truncated": ("w.pt", _truncated, "damaged"),
    "flipped bits": ("w.pt", _flipped, "damaged"),
    "empty safetensors": ("w.safetensors", lambda p: p.write_bytes(b""), "damaged"),
    "truncated safetensors": ("w.safetensors", _truncated_safetensors, "damaged"),
    "torch as safetensors": ("w.safetensors", lambda p: torch.save({"w": torch.ones(1)}, p), "damaged"),
    "a module": ("w.pt", lambda p: torch.save(nn.Linear(1, 1), p), "torch.nn.modules.linear.Linear"),
    "an object": ("w.pt", lambda p: torch.save({"a": argparse.Namespace()}, p), "argparse.Namespace"),
    "code": ("w.pt", lambda p: torch.save({"w": Evil(p.with_name("ran"))}, p), "mkdir"),
    "old code": (
        "w.pt",
        lambda p: p.write_bytes(pickle.dumps({"w": Evil(p.with_name("ran"))}, protocol=2)),
        "mkdir",
    ),
    "plain pickle": ("w.pkl", lambda p: p.write_bytes(pickle.dumps(Evil(p.with_name("ran")))), "checkpoint"),
    "a list": ("w.pt", lambda p: torch.save([torch.ones(1)], p), "not a state dict"),
    "a tensor": ("w.pt", lambda p: torch.save(torch.ones(1), p), "not a state dict"),
    "a number": ("w.pt", lambda p: torch.save(3, p), "not a state dict"),
    "mixed": ("w.pt", lambda p: torch.save({"w": torch.ones(1), "x": "y"}, p), "not a state dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_no_checkpoints(case: str, tmp_path: Path) -> None:
    name, write, words = REFUSED[case]
    write(tmp_path / name)
    with pytest.raises(InputError) as caught:
        load_tensors(tmp_path / name, "teacher.main.checkpoint")
    text = str(caught.value)
    assert caught.value.place == "teacher.main.checkpoint"
    assert words in text
    assert name in text
    assert "weights_only" not in text  # torch's advice to run the code after all is not passed on
    assert len(text.splitlines()) < 6
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_name_what_differs(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).state_dict(), tmp_path / "w.pt")
    other = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    before = other[0].weight.clone()
    with pytest.raises(InputError, match="another architecture") as caught:
        load_weights(other, tmp_path / "w.pt", "p")
    for words in (
        "2 missing, first 2.weight",
        "2 unknown, first 1.weight",
        "1 of another shape",
        "(2, 3)",
        "(2, 4)",
    ):
        assert words in caught.value.problem
    assert torch.equal(other[0].weight, before)  # nothing was loaded by halves


def test_a_teacher_that_a_run_trained_is_a_checkpoint(tmp_path: Path) -> None:
    """Its file has the names of the component, ``module.`` before those of the model, as DDP's files have."""
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    save_tensors(tmp_path / "teacher.safetensors", nn.ModuleDict({"module": model}).state_dict())
    load_weights(other, tmp_path / "teacher.safetensors", "teacher.main.checkpoint")
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)


def test_weights_of_the_same_architecture_are_loaded(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    save_tensors(tmp_path / "w.safetensors", source.state_dict())
    load_weights(target, tmp_path / "w.safetensors", "p")
    assert torch.equal(source.weight, target.weight)


def test_the_newest_whole_state_is_found_and_damaged_ones_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_state(tmp_path / f"step-{step:09d}.state", {"step": step})
    (tmp_path / "step-000000004.state").write_bytes(b"")
    (tmp_path / "step-000000003.state").write_text("hello world", "utf-8")
    said: list[str] = []
    found = newest_state(tmp_path, said.append)
    assert found is not None
    assert found[1] == {"step": 2}
    assert [line.partition(" ")[0] for line in said] == ["step-000000004.state", "step-000000003.state"]
    assert newest_state(tmp_path / "nowhere") is None
