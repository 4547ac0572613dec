"""TAID: Temporally Adaptive Interpolated Distillation (Shing et al.; ICLR 2025, arXiv 2501.16937).

The target is p_t = softmax((1 - t) sg(z_S) + t z_T), mixed in logit space with the student's part held
constant. t rises from t_start to t_end: never below a linear schedule, and faster while the loss falls.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from kdcore import Batch, Loss, Outputs
from kdcore.functional import chunked, interpolated_kl

Variant = Literal["paper", "released"]
Share = Annotated[float, Field(ge=0, le=1)]


def taid_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, t: float, variant: Variant = "paper"
) -> Tensor:
    """J_t = KL(p_t || q) of each row, q = softmax(student_logits); ``released``: the cross-entropy -sum p_t log q.

    Logits [..., V] of both, t in [0, 1]; returns [...]. The two variants have the same gradient,
    dJ/dz_S = q - p_t, and differ by the entropy of p_t. There is no temperature. Computed in float32
    (float64 stays); no gradient to the teacher, nor to the student through p_t.
    """
    return interpolated_kl(
        student_logits, teacher_logits, t=t, subtract_entropy=variant == "paper", t_squared=False
    )


def next_t(
    t: float,
    momentum: float,
    previous: float,
    loss: float,
    *,
    progress: float,
    t_start: float,
    t_end: float = 1.0,
    alpha: float = 5e-4,
    beta: float = 0.99,
) -> tuple[float, float]:
    """(t, momentum) after a step whose loss was ``loss``, the step before it ``previous`` (section 3.2).

    delta = (previous - loss) / previous, m <- beta m + (1 - beta) delta,
    t <- min(t_end, max(linear schedule at ``progress``, t + alpha sigmoid(m) (1 - t))).
    """
    change = (previous - loss) / (previous + 1e-15)
    momentum = beta * momentum + (1 - beta) * change
    linear = t_start + (t_end - t_start) * progress
    return min(t_end, max(linear, t + alpha / (1 + math.exp(-momentum)) * (1 - t))), momentum


class TAIDLoss(Loss):
    """TAID with its state: t, the momentum and the previous loss, the same on every rank, saved with the run.

    ``adaptive = false`` gives the linear schedule. ``alpha``: at its default the adaptive part exceeds the
    linear schedule only in runs longer than about 2 / alpha steps (4,000); in a run of N steps use 4/N to 8/N.
    t moves once an optimiser step, and never in evaluation; the released code moves it at every forward.
    """

    t_squared = False

    def __init__(
        self,
        *,
        t_start: Annotated[float, Field(ge=0, lt=1)] = 0.4,
        t_end: Annotated[float, Field(gt=0, le=1)] = 1.0,
        alpha: Share = 5e-4,
        beta: Share = 0.99,
        adaptive: bool = True,
        variant: Variant = "paper",
    ) -> None:
        super().__init__()
        if t_end < t_start:
            raise ValueError(
                f"t_end = {t_end} is below t_start = {t_start}: the target would move away from the teacher"
            )
        self.t_start, self.t_end, self.alpha, self.beta = t_start, t_end, alpha, beta
        self.adaptive, self.variant = adaptive, variant
        self.t, self.momentum, self.previous = t_start, 0.0, math.inf

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        options = {"t": self.t, "variant": self.variant}
        if student.logits is None and student.unembed is not None and teacher.unembed is not None:
            return chunked(taid_loss, student.unembed, teacher.unembed, student.mask, **options)
        return taid_loss(student["logits"], teacher["logits"], **options)

    def after_step(self) -> None:
        """Move t by the step's loss over the global batch."""
        loss = self.run.value_of(self)
        done = self.run.step - 1  # the schedule counts the steps before this one
        linear = self.t_start + (self.t_end - self.t_start) * done / self.run.total_steps
        if not self.adaptive:
            self.t = linear
        elif math.isfinite(self.previous):
            schedule = {"t_start": self.t_start, "t_end": self.t_end, "alpha": self.alpha, "beta": self.beta}
            progress = done / self.run.total_steps
            self.t, self.momentum = next_t(
                self.t, self.momentum, self.previous, loss, progress=progress, **schedule
            )
        self.previous = loss
        self.run.log(taid_t=self.t)

    def get_extra_state(self) -> dict[str, float]:
        return {"t": self.t, "momentum": self.momentum, "previous": self.previous}

    def set_extra_state(self, state: Any) -> None:
        self.t, self.momentum, self.previous = state["t"], state["momentum"], state["previous"]

    def extra_repr(self) -> str:
        return f"t_start={self.t_start}, t_end={self.t_end}, alpha={self.alpha}, beta={self.beta}, {self.variant}"
