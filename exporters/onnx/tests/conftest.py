"""Students for the tests, and one finished artefact that many tests read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kd_exporter_onnx import ExportSpec, export
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Cnn(nn.Module):
    """Convolutions with batch norm, [B, 1, 8, 8] to 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean((2, 3)))


class TwoHeads(nn.Module):
    """Two heads whose probabilities are mixed at inference, and an auxiliary head of training."""

    def __init__(self, mix: float = 0.3) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(16, 5)
        self.aux_head = nn.Linear(16, 5)
        self.mix = mix

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).relu()
        return self.a(hidden), self.b(hidden)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.heads(x)
        return (1 - self.mix) * a.softmax(-1) + self.mix * b.softmax(-1)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.f(x)
        return -self.f(x)


class Function(nn.Module):
    """A linear layer, then any function."""

    def __init__(self, function: Callable[[Tensor], Tensor], inputs: int = 8, outputs: int = 3) -> None:
        super().__init__()
        self.f, self.function = nn.Linear(inputs, outputs), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.f(x))


class Adaptive(nn.Module):
    """Pools to 7 x 7 from any size: torch.onnx writes a graph that is right at the traced size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 49, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.conv(x), 7).flatten(1))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def students() -> SimpleNamespace:
    """The classes above; a test module cannot import from this file."""
    return SimpleNamespace(Cnn=Cnn, TwoHeads=TwoHeads, Branch=Branch, Function=Function, Adaptive=Adaptive)


@pytest.fixture(scope="session")
def accuracy() -> Callable[[dict[str, Any], Any], float]:
    return lambda outputs, targets: float((outputs["logits"].argmax(-1) == targets).mean())


@pytest.fixture(scope="session")
def flat_spec() -> Callable[..., ExportSpec]:
    """A specification for a student from [B, 8] to one output `y`; keywords replace parts of it."""

    def make(count: int = 24, **changes: Any) -> ExportSpec:
        x = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
        plain = {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ("batch", 8)}],
            "outputs": ("y",),
            "axes": {"batch": {"min": 1, "max": 16}},
            "samples": {"x": x},
        }
        return ExportSpec(**(plain | changes))

    return make


@pytest.fixture(scope="session")
def digits() -> SimpleNamespace:
    """Digits 0 to 16 as bytes; train and test; `prepared` as the student of `trained` was fed."""
    bunch = load_digits()
    images, targets = bunch.images.astype(np.uint8), bunch.target
    prepared = ((images[:, None].astype(np.float32) / 16) - 0.3) / 0.35
    held = np.arange(len(targets)) % 6 == 0
    return SimpleNamespace(
        raw=images[held], x=prepared[held], y=targets[held], train=prepared[~held], labels=targets[~held]
    )


@pytest.fixture(scope="session")
def trained(digits: SimpleNamespace) -> nn.Module:
    """The CNN after 12 epochs: above 0.9 on the held-out images."""
    torch.manual_seed(0)
    model, x, y = Cnn().train(), torch.from_numpy(digits.train), torch.from_numpy(digits.labels)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(100):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


@pytest.fixture(scope="session")
def digits_spec(digits: SimpleNamespace, accuracy: Any) -> Callable[..., ExportSpec]:
    def make(**changes: Any) -> ExportSpec:
        plain = {
            "name": "digits",
            "inputs": [{"name": "image", "dtype": "float32", "shape": ("batch", 1, 8, 8)}],
            "outputs": ("logits",),
            "axes": {"batch": {"min": 1, "max": 64}},
            "samples": {"image": digits.x},
            "calibration": {"image": digits.train[:256]},
            "metric": accuracy,
            "metric_name": "accuracy",
            "targets": digits.y,
            "preprocessing": [
                {"step": "add_axis", "axis": 1},
                {"step": "scale", "factor": 1 / 16},
                {"step": "normalise", "mean": [0.3], "std": [0.35]},
            ],
            "raw_samples": {"image": digits.raw},
            "labels": [str(digit) for digit in range(10)],
            "source": {"licence": "MIT"},
        }
        return ExportSpec(**(plain | changes))

    return make


@pytest.fixture(scope="session")
def shipped(trained: nn.Module, digits_spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished artefact of `trained`; read it only."""
    out = tmp_path_factory.mktemp("shipped") / "digits"
    export(trained, digits_spec(), out, benchmark="none")
    return out


@pytest.fixture
def artefact(shipped: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shipped, tmp_path / "artefact"))
