"""What the student takes a CLIP-like model to be: two towers, a projection, a scale."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import InputError


class TwoTowers(nn.Module):
    """CLIP as a classifier: logits I = s f t^T [B,C] of unit vectors f and t, s = exp(``logit_scale``).

    ``encoder(*inputs)`` gives image embeddings [B,De] as they leave the projection; ``text()`` the class embeddings
    [C,De], whatever prompt it learns being its parameters. ``projection`` is the path, in the encoder, of a linear
    layer or of a parameter P [Dv,De] (CLIP: ``proj`` of a ViT, ``attnpool.c_proj`` of a ResNet). Neither tower
    normalises.
    """

    def __init__(self, encoder: nn.Module, text: nn.Module, *, projection: str, scale: float = 100.0) -> None:
        super().__init__()
        self.encoder, self.text, self.path = encoder, text, projection
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.projection()

    def forward(self, *inputs: Tensor) -> Tensor:
        f, t = F.normalize(self.encoder(*inputs), dim=-1), F.normalize(self.text(), dim=-1)
        return self.logit_scale.exp() * f @ t.T

    def projection(self) -> tuple[Tensor, Tensor]:
        """P [Dv,De] and its bias [De] (zeros where it has none), detached."""
        owner, _, name = self.path.rpartition(".")
        try:
            found = getattr(self.encoder.get_submodule(owner), name)
        except AttributeError:
            found = None
        if isinstance(found, nn.Linear):
            weight, bias = found.weight.detach().T, found.bias
            return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()
        if isinstance(found, Tensor) and found.dim() == 2:
            return found.detach(), found.new_zeros(found.shape[1])
        linear = [n for n, m in self.encoder.named_modules() if isinstance(m, nn.Linear)]
        problem = "no projection of the encoder at this path"
        raise InputError("student.clip.projection", problem, given=self.path, allowed=linear)
