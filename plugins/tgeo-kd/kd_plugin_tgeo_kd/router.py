"""The ratio as a router: alpha weighs the teacher's term, 1 - alpha the label's, and learns before each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_plugin_tgeo_kd.bilevel import look_ahead
from kd_plugin_tgeo_kd.geometry import FusionRatio, class_means, trilateral
from kdcore import Batch, InputError, Outputs, Router, parallel
from kdcore.data import Key, batch_of

Count = Annotated[int, Field(gt=0)]


class TGeoKD(Router):
    """alpha_i = f_omega(Delta_i); the step's objective is mean(alpha L_KD + (1 - alpha) L_GT), omega's is held-out L_GT.

    One teacher, classification, and labels for every sample. The held-out samples are the split ``tune`` (the recipe's
    ``data.tune``), ``held_out`` of them a step (None: as many as the training batch). ``rate``: the length of the
    look-ahead's step, None the recipe's learning rate. ``hidden``: units of f's only hidden layer. ``every``: omega
    learns in every so many of the student's steps. ``variant = "released"``: squared edges, the released controller,
    and, as its code has it, no learning. The log has the held-out loss, and the mean ratio where the teacher's class is
    the label and where it is not.
    """

    reads = ("student.logits", "teacher.logits")
    labels_column = True
    own_optimizer: ClassVar[Mapping[str, Any] | None] = {"use": "Adam", "lr": 1e-3}
    means: Tensor  # [C,C]

    def __init__(
        self,
        *,
        hidden: Count = 128,
        rate: Annotated[float, Field(gt=0)] | None = None,
        held_out: Count | None = None,
        every: Count = 1,
        variant: Literal["paper", "released"] = "paper",
    ) -> None:
        super().__init__()
        self.hidden, self.rate, self.held_out = hidden, rate, held_out
        self.every, self.variant = every, variant
        self._mode: Literal["step", "ahead", "labels"] = "step"

    # ---- before training --------------------------------------------------------------------------

    def setup(self) -> None:
        """The teacher's one pass over the training split, for Tbar; f as wide as there are classes."""
        if len(self.run.routed) != 1:
            problem = "weighs one teacher against the labels"
            raise InputError("router.teachers", problem, given=list(self.run.routed))
        self.register_buffer("means", class_means(self._answers()))
        released = self.variant == "released"
        self.f = FusionRatio(len(self.means), (32, 16) if released else (self.hidden,))
        if not released:
            next(self.run.data("tune"))  # says what to do where there is no such split
            self.rate = self._rate()

    @torch.no_grad()
    def _answers(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.run.data("train"):
            yield self._teacher(self.run.ask(self.run.routed[0], batch)), _labels(batch)

    def _teacher(self, said: Outputs) -> Tensor:
        T: Tensor = said["logits"].detach().float().softmax(-1)
        if T.dim() != 2:
            raise InputError(
                "router", "weighs samples of a classifier", given=tuple(T.shape), allowed="logits [B,C]"
            )
        return T

    def _rate(self) -> float:
        table = self.run.recipe and self.run.recipe.train.optimizer.params
        found = self.rate or (table or {}).get("lr")
        if found is None:
            raise InputError("router.rate", "the recipe's optimiser names no lr", hint="set rate")
        return float(found)

    # ---- the ratio --------------------------------------------------------------------------------

    def plan(self, batch: Batch, student: Outputs) -> Tensor | None:
        """The teacher is not asked about held-out samples."""
        return torch.zeros(len(batch), 1, dtype=torch.bool) if self._mode == "labels" else None

    def forward(self, batch: Batch, student: Outputs, teachers: Mapping[str, Outputs]) -> Tensor:
        """[B,2]: alpha and 1 - alpha. Its graph is kept in the look-ahead alone; Delta never carries gradient."""
        if self._mode == "labels":
            return torch.tensor([0.0, 1.0], device=student["logits"].device).expand(len(batch), 2)
        with torch.set_grad_enabled(self._mode == "ahead"):
            alpha = self.f(self.geometry(batch, student, teachers[self.run.routed[0]]))
        return torch.stack([alpha, 1 - alpha], 1)

    def geometry(self, batch: Batch, student: Outputs, teacher: Outputs) -> Tensor:
        """Delta [B,9C], detached."""
        y = _labels(batch)
        S, T = student["logits"].detach().float().softmax(-1), self._teacher(teacher)
        G = F.one_hot(y, S.shape[1]).to(S)
        return trilateral(S, T, self.means[y], G, squared=self.variant == "released")

    # ---- the outer step ---------------------------------------------------------------------------

    def before_step(self, batch: Batch) -> None:
        if self.variant == "released" or self.run.step % self.every:
            return
        student, held = self.run.student, self._held_out(len(batch))
        theta = {name: p for name, p in student.named_parameters() if p.requires_grad}

        def statistics() -> dict[str, Tensor]:  # batch norm's move in copies
            return {name: value.clone() for name, value in student.named_buffers()}

        def inner(params: Mapping[str, Tensor]) -> Tensor:
            with self._asked("ahead"):
                return self.run.objective(batch, {**params, **statistics()})

        def outer(params: Mapping[str, Tensor]) -> Tensor:
            with self._asked("labels"):
                return self.run.objective(held, {**params, **statistics()})

        assert self.rate is not None
        surrogate, value = look_ahead(inner, outer, theta, self.rate, _over_processes)
        self.run.update(self, surrogate)
        self.run.log(tgeo_held_out=value.item())

    @contextmanager
    def _asked(self, mode: Literal["ahead", "labels"]) -> Iterator[None]:
        self._mode = mode
        try:
            yield
        finally:
            self._mode = "step"

    def _held_out(self, size: int) -> Batch:
        """Fresh rows of ``tune`` at every step, the same in all processes."""
        tune, size = self.run.source.data.tune, round(parallel.total(size, self.run.device))
        rows = torch.randperm(len(tune), generator=self.run.rng("tgeo-kd"))[: self.held_out or size]
        return batch_of(tune, [Key("tune", 0, row) for row in rows.tolist()]).to(self.run.device)

    @torch.no_grad()
    def after_step(self, batch: Batch, student: Outputs, teachers: dict[str, Outputs]) -> None:
        teacher = teachers[self.run.routed[0]]
        alpha = self.f(self.geometry(batch, student, teacher))
        right = teacher["logits"].argmax(1) == _labels(batch)
        for name, chosen in (("right", right), ("wrong", ~right)):
            if chosen.any():
                self.run.log(**{f"tgeo_alpha_{name}": alpha[chosen].mean().item()})


def _labels(batch: Batch) -> Tensor:
    y = batch.get("target")
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point() or bool((y < 0).any()):
        given = (
            None if y is None else f"{y.dtype} {[*y.shape]}" if isinstance(y, Tensor) else type(y).__name__
        )
        raise InputError(
            "router", "needs the label of every sample", given=given, allowed="target, int64 [B]"
        )
    return y


def _over_processes(gradient: Tensor) -> Tensor:
    return gradient if parallel.world() == 1 else parallel.gather(gradient[None]).mean(0)
