"""The oracle kit: right numbers pass on every path, wrong ones and wrong losses fail on the path that shows it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import Loss, Outputs, conventions
from kdcore.losses import kd_loss
from kdcore.testing import Oracle, Seeded, check_oracle

# Closed form, T = 2: p = (1/2, 1/2), q = (3/4, 1/4), so T^2 KL(p || q) = 4 (ln 4/3) / 2, and its gradient is T (q - p).
DIVERGENCE = 2 * math.log(4 / 3)
KD = Oracle(
    "two classes",
    kd_loss,
    {"student_logits": [[2 * math.log(3), 0.0], [1.0, 1.0]], "teacher_logits": [[0.3, 0.3], [-2.0, -2.0]]},
    [DIVERGENCE, 0.0],
    "closed form: binary divergence from the uniform distribution",
    gradient={"student_logits": [[0.25, -0.25], [0.0, 0.0]]},  # of the mean over two samples
    params={"temperature": 2.0},
)
TOKENS = replace(
    KD,
    name="two positions",
    tensors={
        "student_logits": [[[2 * math.log(3), 0.0], [5.0, 0.0]], [[1.0, 1.0], [2 * math.log(3), 0.0]]],
        "teacher_logits": [[[0.3, 0.3], [1.0, 9.0]], [[0.0, 0.0], [-1.0, -1.0]]],
        "mask": [[True, False], [True, True]],
    },
    value=2 * DIVERGENCE / 3,
    gradient={"student_logits": [[[1 / 6, -1 / 6], [0.0, 0.0]], [[0.0, 0.0], [1 / 6, -1 / 6]]]},
)


def masked_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    value = kd_loss(student_logits, teacher_logits, temperature=temperature)
    return (value * mask).sum() / mask.sum()


class Distance(Loss):
    """A component with a weight of its own."""

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, student: Outputs, teacher: Outputs, batch: Any) -> dict[str, Tensor]:
        gap = (student["embedding"] - teacher["embedding"]).square().sum(-1)
        return {"far": self.scale * gap, "id": 0 * batch["id"] + gap.sqrt()}


def test_paths_of_a_function_of_rows() -> None:
    assert set(check_oracle(KD)) == {
        "direct, float64",
        "direct, float32",
        "component, float64",
        "component, float32",
        "bf16 autocast",
        "sample by sample",
        "chunked",
    }


def test_paths_of_tokens() -> None:
    assert {"masked positions replaced", "chunked"} <= set(
        check_oracle(replace(TOKENS, of="kdcore.losses:kd_loss"))
    )
    paths = check_oracle(replace(TOKENS, of=conventions(couples_batch=True)(masked_kl)))
    assert "masked positions replaced" in paths
    assert not {"sample by sample", "chunked"} & set(paths)


def test_component_by_name() -> None:
    assert "component, float64" in check_oracle(replace(KD, of="loss:kd"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value": [DIVERGENCE, 1e-3]}, "value is .*expected 0.001"),
        ({"value": DIVERGENCE}, "value is"),
        ({"value": [DIVERGENCE] * 3}, "shape"),
        ({"gradient": {"student_logits": [[0.25, -0.25], [0.0, 1e-2]]}}, "gradient of student_logits"),
        ({"gradient": {"teacher_logits": [[0.25, -0.25], [0.0, 0.0]]}}, "gradient of teacher_logits"),
        ({"params": {"temperature": 1.0}}, "value is"),
        ({"source": "I ran it"}, "none of: repository@commit"),
        ({"source": "owner/repository@main"}, "none of: repository@commit"),
    ],
)
def test_what_is_wrong_is_found(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_oracle(replace(KD, **changes))


def test_commits_are_sources() -> None:
    assert check_oracle(replace(KD, source="https://github.com/owner/repository@a062892, losses.py"))


def half(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Right in float64 alone."""
    low = student_logits.half() if student_logits.dtype == torch.float32 else student_logits
    return kd_loss(low + 100, teacher_logits, temperature=temperature)


def neighbours(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """A softmax over the batch, right for this batch by accident."""
    value = kd_loss(student_logits, teacher_logits, temperature=temperature)
    return value * len(value) / 2


def forgetful(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    """The mask counts positions and hides none; right where the hidden ones happen to be 0."""
    return kd_loss(student_logits, teacher_logits, temperature=temperature).sum() / mask.sum()


def autocast(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """A product of matrices that bf16 rounds, of numbers that cancel."""
    far = F.linear(student_logits + 300, torch.eye(2, dtype=student_logits.dtype)) - 300
    return kd_loss(far, teacher_logits, temperature=temperature)


@pytest.mark.parametrize(
    ("function", "path"), [(half, "float32"), (neighbours, "sample by sample"), (autocast, "bf16 autocast")]
)
def test_each_path_can_fail(function: Any, path: str) -> None:
    exact = replace(KD, of=function, tolerance=(1e-4, 2e-4, 5e-2))
    with pytest.raises(AssertionError, match=f"two classes, [a-z, ]*{path}"):
        check_oracle(exact)


def test_masked_path_can_fail() -> None:
    """Right where the hidden position happens to be 0."""
    student, teacher = TOKENS.tensors["student_logits"], TOKENS.tensors["teacher_logits"]
    tensors = {
        **TOKENS.tensors,
        "student_logits": [[student[0][0], [9.0, 9.0]], student[1]],
        "teacher_logits": [[teacher[0][0], [1.0, 1.0]], teacher[1]],
    }
    function = conventions(couples_batch=True)(forgetful)
    with pytest.raises(AssertionError, match="two positions, masked positions replaced"):
        check_oracle(replace(TOKENS, of=function, tensors=tensors, gradient={}))


def test_seeded_tensors_and_named_terms() -> None:
    """numpy's RandomState(7) begins with 1.69052570, -0.46593737, 0.03282016, 0.40751628."""
    draws = [1.69052570, -0.46593737, 0.03282016, 0.40751628]
    gaps = [4 * (draws[0] ** 2 + draws[1] ** 2), 4 * (draws[2] ** 2 + draws[3] ** 2)]
    tensors = {"student_embedding": Seeded(7, (2, 2), 2.0), "teacher_embedding": [[0.0, 0.0], [0.0, 0.0]]}
    function = Distance(weight=3.0)

    def distance(student_embedding: Tensor, teacher_embedding: Tensor, id: Tensor) -> dict[str, Tensor]:
        sides = [Outputs(tensors={"embedding": each}) for each in (student_embedding, teacher_embedding)]
        return function.to(student_embedding.dtype)(*sides, {"id": id})  # type: ignore[no-any-return]

    values = {"far": [3 * gap for gap in gaps], "id": [math.sqrt(gap) for gap in gaps]}
    oracle = Oracle("draws", distance, {**tensors, "id": [1, 2]}, values, "closed form: squares of draws")
    assert check_oracle(oracle)
    with pytest.raises(AssertionError, match="far is"):
        check_oracle(replace(oracle, value={"far": gaps}))
