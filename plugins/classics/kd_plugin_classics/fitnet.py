"""FitNets: Hints for Thin Deep Nets (Romero et al.; ICLR 2015, arXiv 1412.6550).

A regressor on the student's guided layer predicts the teacher's hint layer. It is trained with the student and
is no part of what is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from kdcore import Batch, InputError, Loss, Outputs
from kdcore.functional import at_least_float32

Variant = Literal["paper", "released", "repdistiller"]


def hint_loss(guided: Tensor, hint: Tensor, *, variant: Variant = "paper") -> Tensor:
    """The squared differences of the regressor's output and the teacher's features, one value a sample: [B].

    Maps [B, C, H, W] or vectors [B, D], of one shape. ``paper``: half their sum (Eq. 3). ``released``: half
    their sum over the channels, averaged over the positions. ``repdistiller``: their mean, as in the comparisons
    that most tables come from. No gradient to the teacher.
    """
    squares = (at_least_float32(guided) - at_least_float32(hint.detach())).square()
    squares = squares.reshape(*squares.shape[:2], -1)
    if variant == "repdistiller":
        return squares.mean((1, 2))
    return (squares.sum(1).mean(1) if variant == "released" else squares.sum((1, 2))) / 2


def regressor(
    guided: Sequence[int], hint: Sequence[int], variant: Variant = "paper", relu: bool = True
) -> nn.Module:
    """From features of shape ``guided`` to the shape ``hint``: [B, C, H, W] or [B, D].

    A convolution without padding, whose kernel makes up for the difference in size (section 2.2), and the
    teacher's nonlinearity. ``repdistiller`` puts batch norm between them, and halves or doubles a size by stride.
    """
    if len(guided) != len(hint) or len(hint) not in (2, 4):
        raise InputError(
            "classics.fitnet",
            "the two layers do not fit each other",
            given=f"{tuple(guided)} and {tuple(hint)}",
            allowed="maps [B, C, H, W] on both sides, or vectors [B, D]",
        )
    layers = [_resize(guided, hint, strided=variant == "repdistiller")]
    if variant == "repdistiller":
        layers.append(nn.BatchNorm2d(hint[1]) if len(hint) == 4 else nn.BatchNorm1d(hint[1]))
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


class FitNet(Loss):
    """``hint_loss`` of the student's ``feature`` through a trained regressor and the teacher's ``feature``.

    ``relu`` ends the regressor; False where the hint can be negative.
    """

    reads = ("student.feature", "teacher.feature")

    def __init__(self, *, variant: Variant = "paper", relu: bool = True) -> None:
        super().__init__()
        self.variant, self.relu = variant, relu
        self.couples_batch = variant == "repdistiller"  # through the regressor's batch norm

    def setup(self) -> None:
        student, teacher = self.run.preview(self)
        shapes = student["feature"].shape, teacher["feature"].shape
        self.regressor = regressor(*shapes, self.variant, self.relu)

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> Tensor:
        return hint_loss(self.regressor(student["feature"]), teacher["feature"], variant=self.variant)

    def extra_repr(self) -> str:
        return f"variant={self.variant}, relu={self.relu}"


def _resize(guided: Sequence[int], hint: Sequence[int], strided: bool) -> nn.Module:
    if len(hint) == 2:
        return nn.Linear(guided[1], hint[1])
    (c_s, h_s, w_s), (c_t, h_t, w_t) = guided[1:], hint[1:]
    if strided and (h_s, w_s) == (2 * h_t, 2 * w_t):
        return nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    if strided and (2 * h_s, 2 * w_s) == (h_t, w_t):
        return nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    if h_s < h_t or w_s < w_t:
        raise InputError(
            "classics.fitnet",
            f"the student's map {h_s} x {w_s} is smaller than the teacher's {h_t} x {w_t}",
            hint='tap an earlier layer of the student; variant = "repdistiller" can double a size',
        )
    return nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t))
