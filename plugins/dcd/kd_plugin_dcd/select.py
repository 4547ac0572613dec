"""Which candidates the student sees: the match, and the K negatives that the teacher finds hardest (DCD's selection)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcore import Augmentation, Batch, InputError

Share = Annotated[float, Field(ge=0, le=1)]


def hard_list(scores: Tensor, target: Tensor, *, keep: int = 7) -> Tensor:
    """The columns [B,keep+1] of ``scores`` [B,N] that the student sees: ``target`` [B], then the hardest, hardest first.

    The same as the authors' rule, which takes the first keep + 1 of a sorted row, moves the match to the front, and
    drops the last where the match was not among them. ValueError with fewer than ``keep`` negatives.
    """
    if scores.shape[1] <= keep:
        raise ValueError(f"{scores.shape[1] - 1} negatives, and {keep} are to be kept")
    first = scores.scatter(1, target[:, None], torch.inf)
    return torch.sort(first, dim=1, descending=True, stable=True).indices[:, : keep + 1]


def random_list(scores: Tensor, target: Tensor, *, keep: int = 7) -> Tensor:
    """``target`` and the first ``keep`` of the other columns: random ones, where candidates come in random order."""
    return hard_list(
        -torch.arange(scores.shape[1], device=scores.device).float().expand_as(scores), target, keep=keep
    )


class HardNegatives(Augmentation):
    """Asks the teacher about all candidates of a batch, and leaves the student ``keep`` negatives and the match.

    ``keys`` hold candidates [B,N,...], ``target`` [B] the match's column; of N candidates keep + 1 are left, the
    match first, so ``target`` becomes 0. ``by = "random"`` keeps the first negatives, which a data set draws at
    random: the baseline of equal cost for the student. ``warm``: the share of the run that starts with random ones,
    because a student that knows nothing fails on hard ones alone. The teacher's ``keep`` + 1 highest scores,
    descending, are left under ``top_scores`` for the released variant of the loss.
    """

    changes_labels = True
    expected_failures = {"batch_kept": "fewer candidates come out than went in: that is the method"}  # noqa: RUF012

    def __init__(
        self,
        *,
        keep: Annotated[int, Field(gt=0)] = 7,
        keys: list[str] = ["text"],  # noqa: B006 - read only; the schema shows the default
        teacher: str = "main",
        by: Literal["teacher", "random"] = "teacher",
        warm: Share = 0.0,
    ) -> None:
        super().__init__()
        self.keep, self.keys, self.teacher, self.by, self.warm = keep, keys, teacher, by, warm

    def setup(self) -> None:
        if self.teacher not in self.run.teachers:
            allowed = sorted(self.run.teachers) or "the recipe has no teacher"
            raise InputError(f"{self.place}.teacher", "no such teacher", given=self.teacher, allowed=allowed)
        sample = self.run.sample
        for key in self.keys:
            shape = tuple(getattr(sample.get(key), "shape", ()))
            if len(shape) < 2 or shape[1] <= self.keep:
                allowed = f"[B,N,...] with more than {self.keep} candidates"
                raise InputError(f"{self.place}.keys", f"{key!r} is {shape or 'absent'}", allowed=allowed)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        scores = self.run.ask(self.teacher, batch)["logits"].float()
        hard = self.by == "teacher" and self.run.progress >= self.warm
        chosen = (hard_list if hard else random_list)(scores, batch["target"], keep=self.keep)
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        fewer = batch.copy()
        fewer.update({key: batch[key][rows, chosen] for key in self.keys})
        fewer["target"] = torch.zeros_like(batch["target"])
        shown = scores if hard else scores[rows, chosen]
        fewer["top_scores"] = shown.sort(1, descending=True).values[:, : self.keep + 1]
        return fewer
