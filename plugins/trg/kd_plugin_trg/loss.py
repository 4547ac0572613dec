"""TRG's three relation terms in a run: the shared draw of tokens, the projector, the temperature by step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from kd_plugin_trg.graph import contextual_loss, global_loss, local_loss, unit
from kd_plugin_trg.tokens import draw, same_grid, taken, tokens_of
from kdcore import Batch, Loss, Outputs

Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


def temperature_at(progress: float, start: float, end: float, schedule: Literal["linear", "cosine"]) -> float:
    """tau_g at a share of the run: high early for the coarse structure, low later for hard negatives."""
    share = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share


class TRGLoss(Loss):
    """alpha L_inner + beta L_local + gamma L_global, the terms ``inner``, ``local``, ``global``; L_logit is ``kd``'s.

    Reads ``tokens`` of both: maps [B,D,H,W] or tokens [B,n,D], of which ``skip_student`` and ``skip_teacher`` leading
    ones (class tokens) are left out. ``m`` tokens an image, drawn anew each step and the same for both networks, make
    the graph; ``normalise`` brings them to unit length first. Every term is a mean, over tokens or pairs of them,
    where the paper prints sums: its weights times B m. The graph spans the batch, so the batch size is part of the
    method; over processes the batch is gathered. The projector w is trained with the student and not shipped.
    """

    reads = ("student.tokens", "teacher.tokens")
    couples_batch = True
    t_squared = False

    def __init__(
        self,
        *,
        alpha: Weight = 10.0,
        beta: Weight = 1.0,
        gamma: Weight = 0.1,
        m: Count = 4,
        k: Count = 8,
        sigma: Positive = 1.0,
        tau_start: Positive = 1.0,
        tau_end: Positive = 0.1,
        schedule: Literal["linear", "cosine"] = "linear",
        normalise: bool = True,
        skip_student: Annotated[int, Field(ge=0)] = 0,
        skip_teacher: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma, self.m, self.k, self.sigma = alpha, beta, gamma, m, k, sigma
        self.tau_start, self.tau_end, self.schedule, self.normalise = tau_start, tau_end, schedule, normalise
        self.skip_student, self.skip_teacher = skip_student, skip_teacher

    def setup(self) -> None:
        """The projector w, D_s -> D_t, where the global term is on."""
        if self.gamma:
            fs, ft = self._tokens(*self.run.preview(self))
            self.w = nn.Linear(fs.shape[-1], ft.shape[-1], bias=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        fs, ft = self._tokens(student, teacher)
        terms = {"inner": self.alpha * contextual_loss(fs, ft)} if self.alpha else {}
        places = draw(batch["id"], self.m, fs.shape[1], self.run.rng("trg").initial_seed())
        a, b = (taken(f, places) for f in (fs, ft))
        if self.gamma:
            each = global_loss(self.w(a), b, tau=self.tau)
            terms["global"] = self.gamma * each.unflatten(0, places.shape).mean(1)
        if self.beta:
            s, t = (unit(a), unit(b)) if self.normalise else (a, b)
            each = local_loss(s, t, k=self.k, sigma=self.sigma)
            terms["local"] = self.beta * each.unflatten(0, places.shape).mean(1)
        return terms

    @property
    def tau(self) -> float:
        """tau_g of this step."""
        return temperature_at(self.run.progress, self.tau_start, self.tau_end, self.schedule)

    def _tokens(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        fs = tokens_of(student["tokens"], skip=self.skip_student)
        return same_grid(fs, tokens_of(teacher["tokens"], skip=self.skip_teacher).detach())

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, m={self.m}, k={self.k}"
