"""The vision adapter on CLIP's pre-projection features, and the class prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of a norm: an adapted feature may be all zeros behind the ReLU


class Adapter(nn.Module):
    """g = relu(a W2 relu(W1 x) + (1 - a) x), normalised: x [..., Dv] to unit vectors [..., Dv]; no biases.

    The hidden width is ``ratio`` Dv; a is learned from 0.5 on, in every precision.
    """

    def __init__(self, width: int, ratio: int = 2) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, ratio * width, bias=False)
        self.linear2 = nn.Linear(ratio * width, width, bias=False)
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear2(F.relu(self.linear1(x)))
        return F.normalize(F.relu(self.alpha * h + (1 - self.alpha) * x), dim=-1, eps=EPS)


def recover(f: Tensor, inverse: Tensor, bias: Tensor) -> Tensor:
    """x = (f - b) pinv(P): the pre-projection feature [B,Dv] of f = x P + b [B,De]; ``inverse`` is [De,Dv].

    Where Dv > De only the part of x in P's row space comes back; f itself is reproduced exactly.
    """
    return (f - bias) @ inverse


def prototypes(features: Tensor, target: Tensor, classes: int) -> Tensor:
    """p_c, the mean of each class's features [N,D], not normalised again: [classes,D]; zeros where there are none."""
    member = F.one_hot(target, classes).to(features.dtype)
    return (member.T @ features) / member.sum(0).clamp_min(1).unsqueeze(1)
