"""The fitting stage: subspaces of a teacher that is there already, kept as a file for any number of runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from kd_plugin_lelp.loss import weight_of
from kd_plugin_lelp.subspaces import fit_subspaces, moments
from kdcore import InputError, Stage, parallel
from kdcore.checkpoint import save_tensors
from kdcore.data import key_seed
from kdcore.stages import StageRun
from kdcore.taps import Taps


class Fit(Stage):
    """One pass of the teacher ``of`` over the training split; artefact ``subspaces``, for ``subspaces = "@fit.subspaces"``.

    For a teacher with a checkpoint or pretrained weights. One that is trained in the run itself (``train``)
    has none before the stage that trains it: there the loss fits by itself, and no stage is needed.
    """

    def __init__(
        self,
        *,
        subclasses: Annotated[int, Field(ge=1)] = 5,
        of: str = "main",
        head: str = "head",
        null_space: bool = True,
        rotate: bool = True,
    ) -> None:
        self.subclasses, self.of, self.head = subclasses, of, head
        self.null_space, self.rotate = null_space, rotate

    def run(self, run: StageRun) -> dict[str, Any]:
        path = run.folder / "subspaces.safetensors"
        if not path.exists():
            weight, batches = self._pass(run)
            generator = torch.Generator().manual_seed(key_seed(run.seed, "lelp rotation"))
            found = fit_subspaces(
                moments(batches, len(weight)),
                weight if self.null_space else None,
                self.subclasses,
                generator if self.rotate else None,
            )
            if not parallel.rank():
                save_tensors(
                    path, {name: value.contiguous().cpu() for name, value in found._asdict().items()}
                )
            parallel.barrier()
        return {"subspaces": str(path)}

    def _pass(self, run: StageRun) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
        """W, and (h, class) of the training split's batches."""
        tables = run.recipe.teacher
        if self.of not in tables:
            raise InputError("stage.of", "no such teacher", given=self.of, allowed=list(tables))
        table = tables[self.of]
        if table.train is not None:
            hint = "take this stage and loss.subspaces out: the loss then fits when the teacher is trained"
            raise InputError(f"teacher.{self.of}.train", "is not trained yet in this stage", hint=hint)
        teacher = run.builder().make("teacher", table.use, table.params, f"teacher.{self.of}")
        teacher = teacher.to(run.device).eval()
        taps = Taps(teacher.model, {f"{self.head}.in": f"{self.head}.in"}, "stage.head")

        @torch.no_grad()
        def embeddings() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in run.source.loader("train"):
                batch = batch.to(run.device)
                batch.update({key: batch[source] for key, source in table.view.items()})
                with taps.reading() as seen:
                    logits = teacher(batch).logits
                yield seen[f"{self.head}.in"], batch["target"] if "target" in batch else logits.argmax(1)

        return weight_of(teacher.model, self.head, "stage.head"), embeddings()
