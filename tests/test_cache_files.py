"""The files of a cache: the same bytes however it was made, damage found, read by many."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
import tomli_w
import torch
from torch.utils.data import DataLoader, Dataset

import kdcore
from kdcore.caching import Cache, writer
from kdcore.caching.shards import Columns, Shard, write
from kdcore.errors import InputError, RunError

Tree = dict[str, Any]


@pytest.fixture
def many(tiny: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """The tiny recipe with a shard for every two batches."""
    tiny["data"]["batch_size"] = 8
    tiny["teacher"]["main"].pop("train")
    monkeypatch.setattr(writer, "SHARD_BYTES", 16 * (10 * 4 + 24))
    return tiny


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def damage(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


def test_made_twice_the_bytes_are_the_same(many: Tree, tmp_path: Path) -> None:
    first, second = (kdcore.cache(many, out=tmp_path / name).folder for name in "ab")
    assert len(files(first)) == 1 + 7
    assert files(first) == files(second)


def test_stopped_after_any_shard_and_run_again(
    many: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(kdcore.cache(many, out=tmp_path / "whole").folder)
    real = writer.write_shard

    class Killed(BaseException):
        pass

    for survived in (0, 1, 4, 6):
        folder, left = tmp_path / f"after-{survived}", [survived]

        def once(path: Path, columns: Columns, identity: str, left: list[int] = left) -> None:
            if not left[0]:
                path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
                raise Killed
            left[0] -= 1
            real(path, columns, identity)

        monkeypatch.setattr(writer, "write_shard", once)
        with pytest.raises(Killed):
            kdcore.cache(many, out=folder)
        with pytest.raises(InputError, match="the cache is not complete"):
            Cache(folder)
        monkeypatch.setattr(writer, "write_shard", real)
        kdcore.cache(many, out=folder)
        assert files(folder) == whole


@pytest.mark.parametrize("survived", [3, 7])
def test_gone_on_with_another_batch_size(
    survived: int, many: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are cut by batches: those that are there and those to come must share their edges."""
    whole = files(kdcore.cache(many, out=tmp_path / "whole").folder)
    real, left = writer.write_shard, [survived]

    def some(path: Path, columns: Columns, identity: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, columns, identity)

    monkeypatch.setattr(writer, "write_shard", some)
    with suppress(KeyboardInterrupt):
        kdcore.cache(many, out=tmp_path / "part")
    monkeypatch.setattr(writer, "write_shard", real)
    many["data"]["batch_size"] = 12
    kdcore.cache(many, out=tmp_path / "part")
    assert files(tmp_path / "part") == whole


def test_killed_by_the_system_and_run_again(many: Tree, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(many))
    code = (
        "import sys, time; from kdcore.caching import writer; import kdcore; writer.SHARD_BYTES = 16 * 64;"
        "real = writer.write_shard; writer.write_shard = lambda *a: (real(*a), time.sleep(0.2));"
        "kdcore.cache(sys.argv[1], out=sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.toml")]
    child = subprocess.Popen([*command, str(tmp_path / "killed")], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(list((tmp_path / "killed").glob("shard-*"))) < 3 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    recipe = str(tmp_path / "recipe.toml")
    again, whole = (kdcore.cache(recipe, out=tmp_path / name).folder for name in ("killed", "whole"))
    assert files(again) == files(whole)


def test_a_damaged_shard_is_made_anew(many: Tree, tmp_path: Path) -> None:
    folder = kdcore.cache(many, out=tmp_path / "cache").folder
    whole = files(folder)
    damage(folder / "shard-00002.safetensors", -3)
    (folder / "shard-00003.safetensors").write_bytes(whole["shard-00003.safetensors"][:-1])
    (folder / "shard-00005.safetensors").unlink()
    kdcore.cache(many, out=folder)
    assert files(folder) == whole


@pytest.mark.parametrize("cut", [1, 100, None])
def test_a_truncated_shard_is_found_when_the_cache_is_opened(
    cut: int | None, many: Tree, tmp_path: Path
) -> None:
    made = kdcore.cache(many, out=tmp_path / "cache")
    path = made.folder / "shard-00004.safetensors"
    path.write_bytes(path.read_bytes()[: -cut if cut else 0])
    with pytest.raises(RunError, match=r"shard-00004.safetensors: a damaged shard"):
        len(Cache(made.folder))
    many["teacher"]["main"] |= {"use": "cached", "path": str(made.folder)}
    with pytest.raises(kdcore.KDError, match=r"shard-00004.safetensors: a damaged shard"):
        kdcore.run(many, out=tmp_path / "run")


def test_any_flipped_bit_is_found(many: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(many, out=tmp_path / "cache")
    path = made.folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(header, len(whole), 37), 0, 20, header - 20]:
        damage(path, place)
        with pytest.raises(RunError, match="shard-00001"):
            Cache(made.folder).check_all()
        path.write_bytes(whole)
    Cache(made.folder).check_all()


def test_a_shard_of_another_cache_is_found(many: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(many, out=tmp_path / "cache").folder
    many["teacher"]["main"]["args"] = {"hidden": [12]}
    other = kdcore.cache(many, out=tmp_path / "other").folder
    (made / "shard-00001.safetensors").write_bytes((other / "shard-00001.safetensors").read_bytes())
    with pytest.raises(RunError, match="it belongs to another cache"):
        len(Cache(made))


@pytest.mark.parametrize("change", ["digest", "text", "version"])
def test_a_header_that_was_changed_is_found(change: str, many: Tree, tmp_path: Path) -> None:
    path = kdcore.cache(many, out=tmp_path / "cache").folder / "cache.json"
    text = path.read_text()
    if change == "text":
        path.write_text(text[:-20])
    else:
        old, new = {"digest": ('"weights": "', '"weights": "0'), "version": ("cache 2", "cache 9")}[change]
        path.write_text(text.replace(old, new, 1))
    with pytest.raises(
        InputError, match="made by another version" if change == "version" else "a damaged header"
    ):
        Cache(path.parent)


def test_shards_are_plain_safetensors(many: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(many, out=tmp_path / "cache")
    with safetensors.safe_open(made.folder / "shard-00000.safetensors", "pt") as file:
        assert set(file.keys()) == {"id", "key", "crc", "logits"}
        assert torch.equal(file.get_tensor("logits"), made.read(torch.arange(16))["logits"])


class Answers(Dataset[Any]):
    """A data set of a cache's rows, for workers."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, places: list[int]) -> torch.Tensor:
        return self.cache.read(torch.tensor(places))["logits"]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_rows_are_read_in_any_order_by_several_processes(start: str, many: Tree, tmp_path: Path) -> None:
    made = kdcore.cache(many, out=tmp_path / "cache")
    whole = made.read(torch.arange(len(made)))["logits"]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(
        Answers(made),
        sampler=order,
        batch_size=9,
        num_workers=2,
        collate_fn=_same,
        multiprocessing_context=start,
    )
    assert torch.equal(torch.cat(list(loader)), whole[order])
    assert torch.equal(pickle.loads(pickle.dumps(made)).read(torch.tensor(order))["logits"], whole[order])


def _same(batch: Any) -> Any:
    return batch


def test_rows_of_several_lengths(tmp_path: Path) -> None:
    columns: Tree = {
        "a": torch.randn(8, 3).split([2, 0, 5, 1]),
        "b": torch.arange(4).split(1),
        "c": torch.randn(8).to(torch.bfloat16).split([2, 0, 5, 1]),
        "d": torch.zeros(0, 2).split([0, 0, 0, 0]),
    }
    write(tmp_path / "shard.safetensors", columns, "me")
    shard = Shard(tmp_path / "shard.safetensors", "me")
    for place in (3, 1, 2):
        row = shard.row(place)
        assert all(torch.equal(row[name], pieces[place]) for name, pieces in columns.items())


def test_the_command_line(many: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kdcore.cli import main

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(many))
    out = str(tmp_path / "cache")
    with pytest.raises(SystemExit) as leave:
        main(["cache", str(recipe), "--out", out, "--codec", "topk", "--k", "4", "--quiet"])
    assert leave.value.code == 0
    said = capsys.readouterr().out
    assert "100 rows" in said
    command = said.splitlines()[-1].split()
    assert command[:3] == ["kd", "run", str(recipe)]
    with pytest.raises(SystemExit) as leave:
        main([*command[1:], "--out", str(tmp_path / "run"), "--quiet"])
    assert leave.value.code == 0
    with pytest.raises(SystemExit) as leave:
        main(["cache", str(recipe), "--out", str(tmp_path / "b"), "--codec", "topk", "--k", "10", "--quiet"])
    assert leave.value.code == 2
    assert "does not leave a rest" in capsys.readouterr().err


def test_listing_imports_neither_torch_nor_the_cache() -> None:
    code = (
        "import sys; from kdcore.cli import kd; kd.main(['list'], standalone_mode=False);"
        "sys.exit(any(n == 'torch' or n.startswith('kdcore.caching') for n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "cached" in done.stdout


def test_a_live_run_does_not_import_the_cache(tmp_path: Path) -> None:
    code = (
        "import sys, json, kdcore; kdcore.run(json.loads(sys.argv[1]), out=sys.argv[2]);"
        "sys.exit(any(n.startswith('kdcore.caching') for n in sys.modules))"
    )
    tree = {
        "data": {"source": "kdcore.datasets:digits", "args": {"labels": 20, "flat": True}},
        "student": {"use": "module", "model": "kdcore.zoo:mlp"},
        "train": {"steps": 1},
    }
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(tree), str(tmp_path / "run")], check=True, timeout=120
    )


def test_a_comparison_tells_caches_apart(many: Tree, tmp_path: Path) -> None:
    prints = []
    for seed in (0, 1):
        tree = copy.deepcopy(many)
        made = kdcore.cache(tree, out=tmp_path / f"cache-{seed}", seed=seed)
        tree["teacher"]["main"] |= {"use": "cached", "path": str(made.folder)}
        kdcore.run(tree, out=tmp_path / f"run-{seed}")
        result = json.loads(next((tmp_path / f"run-{seed}").glob("stages/*/student/result.json")).read_text())
        prints.append(result["guards"]["fingerprint"]["teachers"])
    assert prints[0] != prints[1]


def test_a_second_writer_is_refused_and_the_lock_goes_with_its_process(many: Tree, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    code = (
        "import sys, time; from pathlib import Path; from kdcore.caching.writer import _alone;"
        "lock = _alone(Path(sys.argv[1])); lock.__enter__(); print('here', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "here\n"
            with pytest.raises(InputError, match="another run is at work here"):
                kdcore.cache(many, out=tmp_path / "cache")
        finally:
            first.kill()
    assert len(kdcore.cache(many, out=tmp_path / "cache")) == 100


def test_a_refused_cache_leaves_no_folder(many: Tree, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no loss and no router"):
        kdcore.cache({**many, "loss": []}, out=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
