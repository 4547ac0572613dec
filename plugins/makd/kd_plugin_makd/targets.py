"""The answers: asked once of every training image, kept by the sample's id, and put into each batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kd_plugin_makd.loss import yes_probability
from kdcore import Augmentation, Batch, InputError, Stage, parallel
from kdcore.checkpoint import load_tensors, save_tensors

Answer = Callable[[Batch, Sequence[str]], Tensor]
Whose = Literal["own", "shuffled", "class"]


def digest(questions: Sequence[str]) -> str:
    """Names a list of questions, order included: a table answers this list and no other."""
    return hashlib.sha256("\n".join(questions).encode()).hexdigest()


class Targets:
    """A table of answers: ``id`` int64 [N], ``aspects`` p [N,Q], and ``target`` int64 [N] where it was known.

    A row can be asked for by its id alone. Raises InputError where shapes do not fit, a p is outside [0, 1]
    (logits that were not turned to probabilities) or an id comes twice.
    """

    def __init__(self, ids: Tensor, aspects: Tensor, target: Tensor | None = None) -> None:
        if aspects.dim() != 2 or len(ids) != len(aspects):
            given = f"{tuple(aspects.shape)} for {len(ids)} ids"
            raise InputError("makd.table", "answers must be [N,Q]", given=given)
        if not bool(((aspects >= 0) & (aspects <= 1)).all()):
            raise InputError("makd.table", "answers must be probabilities", allowed="0 to 1, no NaN")
        self.ids, order = ids.sort()
        if bool((self.ids[1:] == self.ids[:-1]).any()):
            raise InputError("makd.table", "an id has two rows of answers")
        self.aspects, self.target = aspects[order].float(), None if target is None else target[order]

    def rows(self, ids: Tensor) -> Tensor:
        """The answers [B,Q] of these samples."""
        known = self.ids.to(ids.device)
        place = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
        if bool((missing := known[place] != ids).any()):
            given = ids[missing][:5].tolist()
            raise InputError("makd.table", "no answers for these samples", given=given, hint="ask again")
        return self.aspects.to(ids.device)[place]

    def shuffled(self, seed: int) -> Targets:
        """The same rows of answers, given to other images: what is left if they hold nothing about the image."""
        order = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(seed))
        return Targets(self.ids, self.aspects[order], self.target)

    def by_class(self) -> Targets:
        """Each image's answers replaced by the mean of its class: what is left of them if they only name the class."""
        if self.target is None:
            raise InputError("makd.table", "no labels beside the answers", hint="ask with labelled data")
        _, row = self.target.unique(return_inverse=True)
        sums = torch.zeros(int(row.max()) + 1, self.aspects.shape[1]).index_add_(0, row, self.aspects)
        return Targets(self.ids, (sums / row.bincount()[:, None])[row], self.target)

    def save(self, path: Path, questions: Sequence[str]) -> None:
        """As safetensors, with the questions and their digest in its header."""
        tensors = {"id": self.ids, "aspects": self.aspects}
        tensors |= {} if self.target is None else {"target": self.target}
        save_tensors(path, tensors, {"questions": json.dumps(list(questions)), "sha256": digest(questions)})

    @classmethod
    def load(cls, path: str | Path) -> Targets:
        found = load_tensors(path, "makd.table")
        if not {"id", "aspects"} <= found.keys():
            raise InputError("makd.table", "no table of answers", given=sorted(found), allowed="id, aspects")
        return cls(found["id"], found["aspects"], found.get("target"))


def read_released(path: Path, stems: Sequence[str]) -> Targets:
    """The authors' JSON, {file's stem: Q probabilities}, for images in the order of ``stems``; ids are their places."""
    table: dict[str, list[float]] = json.loads(path.read_text("utf-8"))
    if absent := [stem for stem in stems if stem not in table]:
        raise InputError(str(path), "no answers for these images", given=absent[:5])
    return Targets(torch.arange(len(stems)), torch.tensor([table[stem] for stem in stems]))


class Ask(Stage):
    """Ask ``answer`` all ``questions`` of every training image, once; the artefact ``targets`` is the table.

    ``answer(batch, questions)`` gives, for a batch as the data source makes it, [B,Q] probabilities of yes, or
    [B,Q,2] logits of "yes" and "no" at the first position that a language model generates. It sees no label: the
    batch is handed over without ``target``. ``questions``: a list, or the path of a text file, one a line.
    """

    def __init__(self, *, answer: Answer, questions: list[str] | str) -> None:
        if isinstance(questions, str):
            path = Path(questions)
            if not path.exists():
                raise InputError("stage.questions", "no such file", given=questions)
            questions = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        if not questions or len(set(questions)) < len(questions):
            raise InputError("stage.questions", "one question at least, none twice", given=len(questions))
        self.answer, self.questions = answer, questions

    @torch.no_grad()
    def run(self, run: Any) -> dict[str, Any]:
        path = run.folder / "targets.safetensors"
        if not path.exists() and not parallel.rank():
            self._asked(run).save(path, self.questions)
        parallel.barrier()
        return {"targets": str(path), "questions": self.questions, "sha256": digest(self.questions)}

    def _asked(self, run: Any) -> Targets:
        rows: dict[str, list[Tensor]] = {"id": [], "aspects": [], "target": []}
        for batch in run.source.loader("train"):
            shown = Batch({k: v for k, v in batch.items() if k != "target"})
            rows["aspects"].append(self._checked(self.answer(shown, self.questions), len(batch)))
            rows["id"].append(batch["id"])
            rows["target"] += [batch["target"]] if "target" in batch else []
        found = {name: torch.cat(values) for name, values in rows.items() if values}
        return Targets(found["id"], found["aspects"], found.get("target"))

    def _checked(self, told: Tensor, size: int) -> Tensor:
        p = yes_probability(told) if told.dim() == 3 and told.shape[-1] == 2 else told
        if p.shape != (size, len(self.questions)):
            allowed = f"({size}, {len(self.questions)}), or the same with logits of yes and no"
            raise InputError("stage.answer", "wrong shape", given=tuple(told.shape), allowed=allowed)
        return p.detach().float().cpu()


class SideTargets(Augmentation):
    """Adds ``aspects`` [B,Q] to each batch: the rows of ``table`` for its ids; without a table the data have them.

    ``whose``: ``own`` rows; as ablations ``shuffled`` over the images (by ``shuffle_seed``) or the mean of the
    image's ``class``. The answers are of the whole image: cropping may cut away what a question was about, and
    what mixes images must come after this and mix ``aspects`` with them. ``stream``: of several, the one that
    has answers.
    """

    changes_inputs = False

    def __init__(
        self,
        *,
        table: str | None = None,
        whose: Whose = "own",
        shuffle_seed: int = 0,
        stream: str | None = None,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.targets = None if table is None else Targets.load(table)
        if self.targets is not None and whose != "own":
            changed = self.targets.shuffled(shuffle_seed) if whose == "shuffled" else self.targets.by_class()
            self.targets = changed

    def forward(self, batch: Batch) -> Batch:
        if self.targets is None:
            return batch
        found = batch.copy()
        for name in found.streams if self.stream is None else (self.stream,):
            part = found.part(name)
            part["aspects"] = self.targets.rows(part["id"])
        return found
