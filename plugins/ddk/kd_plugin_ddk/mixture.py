"""Equations 1 and 2 of the paper: from the perplexities of N domains to the shares in which they are sampled."""

from __future__ import annotations

import torch
from torch import Tensor


def discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """l_S / l_T of each domain, [N]: perplexities exp(CE), not losses; below 1 where the student is better."""
    return student.double() / teacher.double()


def direct(ratio: Tensor) -> Tensor:
    """r_0, equation 1: softmax of the ratios, [N] to [N]. Without smoothing this is the mixture of every interval."""
    return torch.softmax(
        ratio.double(), 0
    )  # subtracts the largest first: an early student's ratio may be in the hundreds


def smoothed(r: Tensor, ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """r_{t+1}, equation 2: psi_i = r_i exp(ratio_i), alpha psi / sum(psi) + (1 - alpha) / N.

    Every share is in [(1 - alpha)/N, alpha + (1 - alpha)/N]. Equal ratios and a uniform r stay as they are; with
    constant unequal ratios it goes to a fixed point, not to ``direct``.
    """
    psi = torch.softmax(r.double().log() + ratio.double(), 0)
    return alpha * psi + (1 - alpha) / len(psi)
