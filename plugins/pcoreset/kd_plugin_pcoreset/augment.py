"""The buyer: training sees only samples whose labels are paid for; after training it says which to pay for next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kd_plugin_pcoreset.selection import Strategy, select
from kdcore import Augmentation, InputError

FILE = "labelled.json"


class Buyer(Augmentation):
    """Draws the epoch's stream from labelled samples alone, and buys ``queries`` labels when training ends.

    The stream that ``data.epoch`` names is the whole pool with its labels, of which only those paid for are ever
    trained on. ``labelled`` is a file of ids, {"labelled": [...]}; without it the samples with a true ``start`` are
    labelled. ``finish`` asks the student in eval mode, without augmentation, about the pool and the labelled samples,
    and leaves labelled.json in the stage's folder: the ids paid for until now, and those ``bought`` for the next round.
    ``strategy``: ``pcoreset``, or what it is compared with; ``features`` is the student's output that ``coreset`` needs.
    """

    changes_inputs: ClassVar[bool] = False
    rows: Tensor
    ids: Tensor

    def __init__(
        self,
        *,
        queries: Annotated[int, Field(ge=0)],
        strategy: Strategy = "pcoreset",
        labelled: str | None = None,
        features: str = "embedding",
    ) -> None:
        super().__init__()
        self.queries, self.strategy, self.labelled, self.features = queries, strategy, labelled, features

    def setup(self) -> None:
        """Where the labelled samples stand in the pool; no label is looked at."""
        ids, start = [], []
        for batch in self.run.data("train"):
            ids.append(batch["id"].cpu())
            start.append(batch.get("start", torch.zeros_like(batch["id"])).bool().cpu())
        self.ids = torch.cat(ids)
        paid = torch.cat(start) if self.labelled is None else torch.isin(self.ids, self._listed())
        self.rows = paid.nonzero().flatten()
        if not len(self.rows):
            problem, hint = (
                "no sample of the pool is labelled",
                "give ids in a file, or the data a key 'start'",
            )
            raise InputError("augmentation.labelled", problem, given=self.labelled, hint=hint)

    def _listed(self) -> Tensor:
        try:
            found = json.loads(Path(str(self.labelled)).read_text("utf-8"))["labelled"]
            return torch.tensor(found, dtype=torch.int64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem, allowed = f"cannot be read: {error}", '{"labelled": [ids]}'
            place = "augmentation.labelled"
            raise InputError(place, problem, given=self.labelled, allowed=allowed) from None

    def draw(self, size: int, epoch: int) -> Tensor:
        """int64 [size]: the labelled samples over and over, each time in another order."""
        generator = self.run.rng("pcoreset.draw")
        turns = -(-size // len(self.rows))
        orders = [torch.randperm(len(self.rows), generator=generator) for _ in range(turns)]
        return self.rows[torch.cat(orders)[:size]]

    @torch.no_grad()
    def finish(self) -> None:
        """Buy: ``queries`` rows of the pool, by the strategy; the student's answers decide, no teacher and no label."""
        paid = torch.zeros(len(self.ids), dtype=torch.bool)
        paid[self.rows] = True
        said = self._asked()
        pool, labelled = ({name: v[side] for name, v in said.items()} for side in (~paid, paid))
        chosen = select(self.strategy, pool, labelled, self.queries, self.run.rng("pcoreset.buy"))
        bought = self.ids[~paid][chosen].tolist()
        if not torch.distributed.is_initialized() or not torch.distributed.get_rank():
            text = json.dumps({"labelled": [*self.ids[paid].tolist(), *bought], "bought": bought})
            (self.run.folder / FILE).write_text(text, "utf-8")

    def _asked(self) -> dict[str, Tensor]:
        """p [N,C] by the student's inference rule, and its features, of the whole pool in order."""
        student = self.run.student
        was_training = student.training
        student.eval()
        rows: dict[str, list[Tensor]] = {"p": []}
        for batch in self.run.data("train"):
            outputs = self.run.ask("student", batch)
            inferred = student.infer(outputs)
            p = (
                inferred["probabilities"]
                if "probabilities" in inferred
                else inferred["logits"].float().softmax(-1)
            )
            rows["p"].append(p.double().cpu())
            if self.strategy == "coreset":
                rows.setdefault("features", []).append(outputs[self.features].flatten(1).double().cpu())
        student.train(was_training)
        return {name: torch.cat(values) for name, values in rows.items()}
