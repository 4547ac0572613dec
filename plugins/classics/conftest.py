"""Fixed tensors, and a loss built and set up as a run does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore import building
from kdcore.distill import Distiller
from kdcore.recipe import parse
from kdcore.stages import StageRun


@pytest.fixture
def wave() -> Callable[..., Tensor]:
    """scale * sin(1.7 n + phase), n = 0, 1, ..., in float64: what the authors' code was run on, too."""

    def make(*shape: int, phase: float = 0.0, scale: float = 1.0) -> Tensor:
        n = torch.arange(math.prod(shape), dtype=torch.float64)
        return (scale * torch.sin(1.7 * n + phase)).reshape(shape)

    return make


@pytest.fixture
def set_up(tmp_path: Path) -> Callable[..., Distiller]:
    """A distiller of two small convolutional networks with one loss, after setup and the dry run."""

    def make(loss: dict[str, Any], widths: tuple[int, int] = (2, 3)) -> Distiller:
        net = {"use": "module", "model": "kdcore.zoo:conv_net"}
        tree = {
            "data": {"source": "kdcore.datasets:digits", "args": {"labels": 40}, "batch_size": 8},
            "teacher": {"main": {**net, "args": {"width": widths[1]}}},
            "student": {**net, "args": {"width": widths[0]}},
            "loss": [loss],
        }
        stage = StageRun(parse(tree), "test", tmp_path)
        distiller, _ = stage.context(building.assemble(stage.recipe, stage.source, stage.builder()))
        return distiller

    return make
