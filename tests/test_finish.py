"""``finish`` tunes the very weights that are shipped, and the last judgement is of what it made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kdcore.checkpoint import load_tensors
from kdcore.report import read_metrics

MODULE = """
    import torch
    from torch import nn
    from kdcore import Outputs, Student

    class Peaked(Student):
        '''Answers rightly after its fourth step only, and always once ``finish`` tuned it.'''

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("tuned", torch.zeros(()))

        def forward(self, batch):
            return Outputs(logits=self.layer(batch["input"].flatten(1)))

        def infer(self, outputs):
            good = self.count == 4 or self.tuned > 0
            return {"logits": outputs.logits if good else torch.zeros_like(outputs.logits)}

        def after_step(self):
            self.count += 1

        def finish(self):
            assert sum(len(batch) for batch in self.run.data("tune")) == 20
            self.tuned.copy_(self.count)
"""
PLUGIN = """
    from kdcore import Component, hookimpl

    @hookimpl
    def kd_students():
        yield Component("peaked", "{module}:Peaked")
"""


@pytest.fixture
def recipe(
    tiny: dict[str, Any], install: Callable[..., Any], write_module: Callable[..., str]
) -> dict[str, Any]:
    install("peaked", PLUGIN.format(module=write_module(MODULE)))
    tiny["data"]["tune"] = 0.2  # 20 of 100 images; 80 in batches of 20 are four steps an epoch
    tiny["data"]["batch_size"] = 20
    tiny["train"] = {"epochs": 3, "optimizer": {"use": "AdamW", "lr": 5e-2}}
    tiny["student"], tiny["teacher"], tiny["loss"] = {"use": "peaked"}, {}, []
    return tiny


@pytest.mark.parametrize(("keep", "shipped"), [("last", 12), ("best", 4)])
def test_finish_sees_the_weights_that_are_shipped(
    recipe: dict[str, Any], tmp_path: Path, keep: str, shipped: int
) -> None:
    result = kdcore.run(recipe, overrides=[f"train.keep={keep}"], out=tmp_path / "run")
    weights = load_tensors(result.student, "test")
    assert int(weights["count"]) == shipped
    assert float(weights["tuned"]) == shipped  # tuned on these weights, and not overwritten after
    judged = result.results["student"]["metrics"]["accuracy"]
    assert judged > 0.3  # a constant answer is right for a tenth
    rows = [
        row
        for row in read_metrics(tmp_path / "run/stages/distill/student/metrics.jsonl")
        if "val/accuracy" in row
    ]
    assert rows[-1]["val/accuracy"] == pytest.approx(judged)
    assert [row["step"] for row in rows] == ([4, 8, 12] if keep == "last" else [4, 8, 12, 12])
    assert torch.isfinite(weights["layer.weight"]).all()
