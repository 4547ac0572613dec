"""What TRG is about, measured: whose neighbours a student's tokens have, and what context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_trg.graph import context, neighbours, squared_distances, unit
from kd_plugin_trg.tokens import draw, same_grid, taken, tokens_of
from kdcore import Probe
from kdcore.taps import Taps

Count = Annotated[int, Field(gt=0)]


def overlap(student_tokens: Tensor, teacher_tokens: Tensor, *, k: int) -> float:
    """Mean share of a token's k nearest in the teacher that are among its k nearest in the student, of unit tokens [M,D].

    1 where all are shared; two unrelated sets of tokens share k / (M - 1).
    """
    mine, theirs = (neighbours(squared_distances(unit(t)), k) for t in (student_tokens, teacher_tokens))
    return float((mine & theirs).sum() / theirs.sum())


def context_correlation(student_tokens: Tensor, teacher_tokens: Tensor) -> float:
    """The mean over images of Pearson's correlation of the two contexts' entries; tokens [B,n,D] of both."""
    rows = (context(t).flatten(1) for t in (student_tokens, teacher_tokens))
    s, t = (F.normalize(r - r.mean(1, keepdim=True), dim=1) for r in rows)
    return float((s * t).sum(1).mean())


class TokenRelations(Probe):
    """``neighbour_overlap`` and ``context_correlation`` of the student with the teacher ``teacher``, and recalls.

    On the first ``images`` of the test split, ``m`` tokens each for the neighbours, at the modules ``student_path``
    and ``teacher_path``. ``tail_recall`` is the mean recall of the ``tail`` last classes over the whole split.
    """

    def __init__(
        self,
        *,
        student_path: str,
        teacher_path: str,
        teacher: str = "main",
        images: Count = 256,
        m: Count = 4,
        k: Count = 8,
        tail: Count = 3,
    ) -> None:
        self.paths = {"student": student_path, teacher: teacher_path}
        self.teacher, self.images, self.m, self.k, self.tail = teacher, images, m, k, tail

    @torch.no_grad()
    def measure(self, run: Any, models: Mapping[str, nn.Module], data: Any) -> dict[str, Any]:
        seen = [self._seen(run, models, batch.to(run.device)) for batch in data.loader("test")]
        ids, right, target = (torch.cat([row[i] for row in seen]) for i in (0, 1, 2))
        fs, ft = same_grid(*(torch.cat([row[i] for row in seen])[: self.images] for i in (3, 4)))
        a, b = (taken(f, draw(ids[: self.images], self.m, fs.shape[1], 0)) for f in (fs, ft))
        classes = sorted(target.unique().tolist())[-self.tail :]
        recalls = [float(right[target == c].float().mean()) for c in classes]
        return {
            "neighbour_overlap": overlap(a, b, k=self.k),
            "context_correlation": context_correlation(fs, ft),
            "accuracy": float(right.float().mean()),
            "tail_recall": sum(recalls) / len(recalls),
        }

    def _seen(self, run: Any, models: Mapping[str, nn.Module], batch: Any) -> tuple[Tensor, ...]:
        """ids, whether the student was right, labels, and the tokens of both."""
        views = {"student": run.recipe.student.view, self.teacher: run.recipe.teacher[self.teacher].view}
        tokens, outputs = {}, {}
        for name, path in self.paths.items():
            mine, model = batch.copy(), models[name]
            mine.update({key: batch[source] for key, source in views[name].items()})
            with Taps(model.model, {"tokens": path}, f"probe.{name}").reading() as found:  # type: ignore[arg-type]
                outputs[name] = model(mine)
            tokens[name] = tokens_of(found["tokens"])
        said = models["student"].infer(outputs["student"])["logits"]  # type: ignore[operator]
        right = said.argmax(-1) == batch["target"]
        return batch["id"], right, batch["target"], tokens["student"], tokens[self.teacher]
