"""What the tests share: a tiny recipe, plugins made on the spot, and runs that are killed and resumed."""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import kdcore
from kdcore import parallel, plugins
from kdcore.distill import Distiller
from kdcore.errors import Interrupted
from kdcore.plugins import Entry
from kdcore.signals import Stop

_numbers = itertools.count()

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "kdcore.datasets:digits", "args": {"labels": 100}, "batch_size": 32},
    "teacher": {
        "main": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [16]}, "train": {"epochs": 1}}
    },
    "student": {"use": "module", "model": "kdcore.zoo:mlp", "args": {"hidden": [8]}},
    "loss": [{"use": "kd", "temperature": 4.0, "weight": 0.9}],
    "train": {"epochs": 2, "optimizer": {"use": "AdamW", "lr": 2e-3}},
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A recipe that trains in a second; a fresh copy to change."""
    tree = copy.deepcopy(TINY)
    tree["data"]["args"]["flat"] = True
    return tree


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a Python module where it can be imported; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str, name: str = "") -> str:
        name = name or f"made_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code), "utf-8")
        importlib.invalidate_caches()
        return name

    return write


@pytest.fixture
def install(
    write_module: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Entry]]:
    """Install a plugin for one test: ``install("slug", code)``. Installed plugins stay beside it."""
    real = plugins._entry_points()
    added: list[Entry] = []
    made: list[str] = []

    def put(slug: str, code: str, *, distribution: str = "", requires: tuple[str, ...] = ()) -> Entry:
        module = write_module(code, f"plugin_{slug.replace('-', '_')}_{next(_numbers)}")
        made.append(module)
        entry = Entry(slug, distribution or f"kd-plugin-{slug}", "0.1", module, requires)
        added.append(entry)
        plugins.registry.cache_clear()
        return entry

    monkeypatch.setattr(plugins, "_entry_points", lambda: [*real, *added])
    yield put
    plugins.registry.cache_clear()
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def digest() -> Callable[[Path], dict[str, str]]:
    """Digests of everything that a run leaves, apart from what says how long it took."""

    def of(folder: Path) -> dict[str, str]:
        found = {}
        for path in sorted(folder.rglob("*")):
            timed = path.suffix in (".md", ".html", ".state", ".log", ".png") or "engine" in path.parts
            if (
                path.is_file()
                and not timed
                and path.name not in ("results.json", "result.json", "artefacts.json")
            ):
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    return of


# every kind of state at once: an EMA teacher, a bank, an augmentation with its own optimiser, dropout
PARTS = """
    import torch
    from torch import nn
    import torch.nn.functional as F
    from kdcore.kinds import Augmentation, Loss
    from kdcore import Component, hookimpl

    class Crash(Exception):
        pass

    CRASH_AT = set()

    class Bank(Loss):
        '''Pulls the student to a running mean of each class's logits: buffers that change in after_step.'''
        reads = ("student.logits",)

        def __init__(self, *, momentum: float = 0.9):
            super().__init__()
            self.momentum = momentum
            self.register_buffer("mean", torch.zeros(10, 10))
            self.project = nn.Linear(10, 10)

        def forward(self, student, teacher, batch):
            return (self.project(student.logits) - self.mean[batch["target"]]).square().sum(-1)

        def after_step(self, batch, student):
            for row, target in zip(student.logits, batch["target"]):
                self.mean[target] = self.momentum * self.mean[target] + (1 - self.momentum) * row
            if self.run.step in CRASH_AT:
                CRASH_AT.discard(self.run.step)
                raise Crash(self.run.step)

    class Noise(Augmentation):
        '''Learned noise with its own optimiser, pushed to where teacher and student disagree.'''
        own_optimizer = {"use": "Adam", "lr": 1e-2}

        def __init__(self, *, size: int = 64):
            super().__init__()
            self.scale = nn.Parameter(torch.full((size,), 0.1))

        def view(self, batch, generator):
            changed = batch.copy()
            noise = torch.randn(batch["input"].shape, generator=generator)
            changed["input"] = batch["input"] + self.scale * noise
            return changed

        def before_step(self, batch):
            seen = self.view(batch, self.run.rng("inner"))
            student = self.run.ask("student", seen).logits
            teacher = self.run.ask("main", seen, grad=True).logits
            self.run.update(self, -F.mse_loss(student, teacher), clip=1.0)

        def forward(self, batch):
            with torch.no_grad():
                return self.view(batch, self.run.generator)
"""
NET = """
    import torch
    from torch import nn
    def dropping(*, width: int = 8):
        return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 10))
"""


@pytest.fixture
def rich(
    tiny: dict[str, Any], install: Callable[..., Any], write_module: Callable[..., str]
) -> tuple[dict[str, Any], Any]:
    """A recipe with every kind of state, and the set of steps at which it crashes (once each)."""
    parts = write_module(PARTS)
    install(
        "bank",
        f"""
        from kdcore import Component, hookimpl
        @hookimpl
        def kd_losses():
            yield Component("bank", "{parts}:Bank")
        @hookimpl
        def kd_augmentations():
            yield Component("bank.noise", "{parts}:Noise")
    """,
    )
    tiny["student"] = {"use": "module", "model": f"{write_module(NET)}:dropping"}
    tiny["teacher"]["ema"] = {"use": "self", "decay": 0.9}
    tiny["augmentation"] = [{"use": "bank.noise"}]
    tiny["loss"] = [
        {"use": "kd", "teacher": "main", "weight": {"start": 0.1, "end": 1.0}},
        {"use": "kd", "teacher": "ema", "temperature": 1.0, "name": "mean-teacher"},
        {"use": "bank", "weight": 0.1},
    ]
    tiny["train"] |= {
        "epochs": 3,
        "clip": 1.0,
        "checkpoint_every": 3,
        "schedule": {"warmup": 0.2},
        "keep": "best",
    }
    return tiny, importlib.import_module(parts)


def stop_at(step: int) -> Any:
    """``Distiller.train_step`` that sends a signal to the last process when the student has made ``step`` steps."""
    real = Distiller.train_step

    def train_step(self: Distiller, data: Any, optim_wrapper: Any) -> Any:
        logs = real(self, data, optim_wrapper)
        if self.run.step == step and self.parts.losses and parallel.rank() == parallel.world() - 1:
            Stop.note(signal.SIGTERM, None)
        return logs

    return train_step


class Ranks:
    """Recipes to run by several processes at once, in a folder; modules beside them can be imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def add(self, name: str, recipe: dict[str, Any], **options: Any) -> Path:
        """``stop``: a step at which one process gets SIGTERM; ``resume``: the name of the run to go on with."""
        path = self.folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(recipe), "utf-8")
        for key, value in options.items():
            path.with_suffix(f".{key}").write_text(str(value), "utf-8")
        return path

    def module(self, name: str, code: str) -> None:
        (self.folder / f"{name}.py").write_text(textwrap.dedent(code), "utf-8")

    def stopped(self, name: str, recipe: dict[str, Any], step: int) -> Path:
        """The run folder of a run that one process left at a step."""
        real, Distiller.train_step = Distiller.train_step, stop_at(step)
        try:
            with pytest.raises(Interrupted):
                kdcore.run(recipe, out=self.out(name))
        finally:
            Distiller.train_step = real
        return self.out(name)

    def run(self, count: int = 2) -> None:
        launch(count, str(Path(__file__).with_name("on_ranks.py")), str(self.folder))

    def out(self, name: str) -> Path:
        return self.folder / f"{name}-run"

    def error(self, name: str) -> str:
        """The first process's exit code and words; empty where the run ended well."""
        path = self.folder / f"{name}.error0"
        return path.read_text("utf-8") if path.exists() else ""


def line(count: int, *command: str) -> list[str]:
    """The command line that starts ``command`` in ``count`` processes, at a port that is free."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *command]


def launch(count: int, *command: str) -> None:
    """Run ``command`` in ``count`` processes of one thread each, and fail where it does."""
    done = subprocess.run(
        line(count, *command),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = [row for row in done.stderr.splitlines() if not row.startswith("W1") and "elastic" not in row]
    assert done.returncode == 0, "\n".join(told[-80:])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """One folder of recipes a test module, so that they share the start of the processes."""
    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def torchrun_line() -> Callable[..., list[str]]:
    return line
