"""The gate: which teachers a sample learns from, read off the student's own logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_mst_distill.loss import Epochs, Factor, scheduled
from kdcore import Batch, InputError, Outputs, Router, parallel


class GateNet(nn.Module):
    """Two linear layers without a nonlinearity between: logits [B,C] -> gate logits [B,M]."""

    def __init__(self, classes: int, teachers: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(classes, 2 * classes), nn.Linear(2 * classes, teachers)

    def forward(self, logits: Tensor) -> Tensor:
        return self.second(self.first(logits))  # type: ignore[no-any-return]


class DenseGateNet(nn.Module):
    """For dense logits [B,C,H,W]: 1x1 and depthwise 3x3 convolution, averaged over space -> [B,M]."""

    def __init__(self, classes: int, teachers: int) -> None:
        super().__init__()
        wide = 2 * classes
        self.point = nn.Conv2d(classes, wide, 1)
        self.depth = nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=wide)
        self.last = nn.Linear(wide, teachers)

    def forward(self, logits: Tensor) -> Tensor:
        return self.last(F.relu(self.depth(F.relu(self.point(logits)))).mean((2, 3)))  # type: ignore[no-any-return]


def load_balance(gate: Tensor, form: Literal["KL", "CV"] = "KL") -> Tensor:
    """How unevenly a batch's gate probabilities [B,M] use the teachers; a scalar.

    KL: KL(u || mean over the batch) / M with u uniform (the authors' ``batchmean`` of a vector divides by M).
    CV: standard deviation (with M - 1) of the teachers' sums over their mean. Both 0 for equal use.
    """
    if form == "KL":
        mean = gate.mean(0)
        return -(mean * len(mean)).log().mean() / len(mean)
    total = gate.sum(0)
    return total.std() / total.mean()


class Gate(Router):
    """g = softmax(GateNet(student logits)); each sample learns from its ``k`` most probable teachers.

    ``variant = "paper"``: the weights are g, so the gate learns from the teachers' divergences, and its input is
    detached. ``"released"``: the chosen teachers weigh 1/k each, the gate's only gradient is the load balance's,
    which reaches the student through the gate's input. ``routing = "random"`` chooses uniformly: the baseline.
    The load balance's weight is multiplied by ``decay`` after the epochs 0, ``every``, 2 ``every``, ...
    """

    def __init__(
        self,
        *,
        k: Annotated[int, Field(gt=0)] = 1,
        variant: Literal["paper", "released"] = "paper",
        routing: Literal["gate", "random"] = "gate",
        balance: Literal["KL", "CV"] = "KL",
        balance_weight: Annotated[float, Field(ge=0)] = 1.0,
        decay: Factor = 0.9,
        every: Epochs = 10,
    ) -> None:
        super().__init__()
        self.k, self.variant, self.routing, self.balance = k, variant, routing, balance
        self.balance_weight, self.decay, self.every = balance_weight, decay, every
        self.gate: GateNet | DenseGateNet

    def setup(self) -> None:
        """The gate is as wide as the student has classes and the run has routed teachers."""
        ways, sample = len(self.run.routed), self.run.sample
        if self.k > ways:
            raise InputError("router.k", f"the run routes among {ways} teachers", given=self.k)
        with torch.no_grad():
            logits = self.run.ask("student", sample.part(sample.streams[0]))["logits"]
        self.gate = (GateNet if logits.dim() == 2 else DenseGateNet)(logits.shape[1], ways)

    def plan(self, batch: Batch, student: Outputs) -> Tensor:
        """Bool [B,M]: the k teachers of each sample."""
        probabilities = self._probabilities(student["logits"].detach())
        if self.routing == "random":
            generator = self.run.rng("mst-distill", shared=False)
            probabilities = torch.rand(probabilities.shape, generator=generator).to(probabilities.device)
        return torch.zeros_like(probabilities, dtype=torch.bool).scatter(
            1, probabilities.topk(self.k).indices, True
        )

    def forward(
        self, batch: Batch, student: Outputs, teachers: Mapping[str, Outputs]
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        logits = student["logits"]
        if self.routing == "random":
            return self.plan(batch, student) / self.k
        g = self._probabilities(logits.detach() if self.variant == "paper" else logits)
        weights = g if self.variant == "paper" else self.plan(batch, student) / self.k
        share = self.balance_weight * scheduled(self.run.epoch, self.decay, self.every)
        return weights, {"balance": share * load_balance(parallel.gather(g), self.balance)}

    def _probabilities(self, logits: Tensor) -> Tensor:
        gate: Tensor = self.gate(logits.float())
        return gate.softmax(1)
