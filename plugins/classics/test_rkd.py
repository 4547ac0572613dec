"""RKD: the paper's sums rebuilt in loops, and the invariances that define it (the authors' numbers are oracles)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from kd_plugin_classics.rkd import angle_loss, distance_loss, rkd_loss
from torch import Tensor

Wave = Callable[..., Tensor]


@pytest.fixture
def pair(wave: Wave) -> tuple[Tensor, Tensor]:
    """Four embeddings: three numbers of the student, two of the teacher."""
    return wave(4, 3, phase=0.3), wave(4, 2, phase=1.1)


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def test_paper_in_loops(pair: tuple[Tensor, Tensor]) -> None:
    """Equations 4 to 9 with Python's math, averaged over the tuples of distinct samples."""
    tables = [embedding.tolist() for embedding in pair]
    pairs = list(itertools.permutations(range(4), 2))
    psi_d = []
    for x in tables:
        lengths = [math.dist(x[i], x[j]) for i, j in pairs]
        psi_d.append([length / (sum(lengths) / len(lengths)) for length in lengths])
    expected_d = sum(huber(s - t) for s, t in zip(*psi_d, strict=True)) / len(pairs)
    triplets = list(itertools.permutations(range(4), 3))

    def cosine(x: list[list[float]], i: int, j: int, k: int) -> float:
        a, b = ([p - q for p, q in zip(x[end], x[j], strict=True)] for end in (i, k))
        return sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    expected_a = sum(huber(cosine(tables[0], *n) - cosine(tables[1], *n)) for n in triplets) / len(triplets)
    assert distance_loss(*pair).item() == pytest.approx(expected_d, rel=1e-10)
    assert angle_loss(*pair).item() == pytest.approx(expected_a, rel=1e-10)
    assert rkd_loss(*pair).item() == pytest.approx(25 * expected_d + 50 * expected_a, rel=1e-10)


def test_angles_of_a_triangle_and_a_line() -> None:
    """Equilateral: all cosines 1/2. On a line: 1, 1 and -1. Huber: 1/8, 1/8 and (3/2 - 1/2)."""
    line = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    assert angle_loss(line, triangle).item() == pytest.approx((1 / 8 + 1 / 8 + 1) / 3, rel=1e-10)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_sees_relations_alone(pair: tuple[Tensor, Tensor], variant: str) -> None:
    """Moving, turning and scaling all student embeddings together changes nothing."""
    s, t = pair
    turn = torch.linalg.qr(torch.arange(9.0, dtype=torch.float64).reshape(3, 3) + torch.eye(3)).Q
    torch.testing.assert_close(
        rkd_loss(5 * s @ turn + 3, t, variant=variant), rkd_loss(s, t, variant=variant)
    )
    assert rkd_loss(t * torch.tensor([1.0, 2.0]), t, variant=variant) > 0.1
    assert rkd_loss(t, t, variant=variant) == 0


def test_equal_samples_leave_a_finite_gradient() -> None:
    s = torch.zeros(4, 3).index_fill(0, torch.tensor([1]), 1.0).requires_grad_()
    loss = rkd_loss(s, torch.eye(4))
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


def test_no_gradient_to_the_teacher(pair: tuple[Tensor, Tensor]) -> None:
    s, t = pair[0].requires_grad_(), pair[1].requires_grad_()
    rkd_loss(s, t).backward()
    assert t.grad is None


def test_two_samples_have_no_triplet() -> None:
    with pytest.raises(ValueError, match="triplets"):
        rkd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
