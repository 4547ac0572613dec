"""The augmentor as a component: it shows its views to the student, and learns between the student's steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_hard import pictures
from kd_plugin_hard.loss import FirstTerm, augmentor_loss, disagreement
from kd_plugin_hard.views import Bound, View, parts_of
from kdcore import Augmentation, Batch, InputError, parallel

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class HARD(Augmentation):
    """HARD: ``views``, applied one after the other, are trained to make teacher and student disagree.

    Student and teachers see a view of each sample with probability ``share``, the sample itself otherwise. After
    each step of the student the augmentor takes ``steps`` steps on ``augmentor_loss`` (0: it stays untrained), on
    the same samples as they came to it, with fresh noise, and the student in eval mode. ``teacher``: its name, by
    default all, averaged. ``thresholds`` (low, high): the augmentor rests from when the disagreement is above high
    until it falls below low. The log has the disagreement and how far the views reach. ``pictures``: how often
    views are drawn, into the folder ``pictures`` of the stage.
    """

    own_optimizer: ClassVar[Mapping[str, Any] | None] = {"use": "Adam", "lr": 1e-2}

    def __init__(
        self,
        *,
        views: list[Augmentation],
        teacher: str | None = None,
        share: Share = 0.5,
        lam_s: Bound = 1.0,
        lam_t: Bound = 1.0,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
        first_term: FirstTerm = "disagreement",
        log: bool = True,
        steps: Count = 1,
        thresholds: tuple[float, float] | None = None,
        clip: Annotated[float, Field(gt=0)] | None = None,
        pictures: Count = 4,
    ) -> None:
        super().__init__()
        known = [view for view in views if isinstance(view, View)]
        if not known or len(known) < len(views):
            allowed = "hard.affine, hard.colour, hard.generator, or a class of kd_plugin_hard.views.View"
            raise InputError("views", "these are not trainable views", given=views, allowed=allowed)
        if thresholds and thresholds[0] > thresholds[1]:
            raise InputError("thresholds", "low is above high", given=thresholds)
        if len({view.key for view in known}) > 1:
            raise InputError("views", "they change different values of the batch")
        self.views, self.key = nn.ModuleList(known), known[0].key
        for view in known:
            view.thaw()
        self.teacher, self.share, self.steps, self.clip = teacher, share, steps, clip
        self.lam_s, self.lam_t, self.temperature, self.log = lam_s, lam_t, temperature, log
        self.first_term: FirstTerm = first_term
        self.thresholds, self.hunting, self.pictures = thresholds, True, pictures
        self._clean: Batch | None = None

    @property
    def _chain(self) -> list[View]:
        return [view for view in self.views if isinstance(view, View)]

    def setup(self) -> None:
        teachers = self.run.teachers
        if not teachers or self.teacher not in (None, *teachers):
            given, allowed = self.teacher, sorted(teachers) or "the recipe has no teacher"
            raise InputError("augmentation.teacher", "no such teacher", given=given, allowed=allowed)

    # ---- the student's side -----------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        self._clean = batch  # what after_step shows to both models; no state: every step sets it anew
        generator = self.run.rng("hard.student", shared=False)
        changed = self._seen(batch, generator)
        for old, new in zip(parts_of(batch, self.key), parts_of(changed, self.key), strict=True):
            left = torch.rand(len(new), generator=generator) >= self.share
            new[self.key] = torch.where(
                left.view(-1, 1, 1, 1).to(new["id"].device), old[self.key], new[self.key]
            )
        return changed

    def _seen(self, batch: Batch, generator: torch.Generator) -> Batch:
        changed = batch.copy()
        for part in parts_of(changed, self.key):
            for view in self._chain:
                part[self.key] = view.view(part[self.key], generator)
        return changed

    # ---- the augmentor's side ---------------------------------------------------------------------

    def after_step(self) -> None:
        """The augmentor's steps against the student as it now is; the student's weights and statistics stay."""
        assert self._clean is not None
        for turn in range(self.steps):
            loss, apart = self._loss(self._clean, self.run.rng(f"hard.augmentor.{turn}", shared=False))
            self.hunting = self._hunts(apart)
            self.run.log(hard_disagreement=apart, hard_hunting=float(self.hunting))
            if not self.hunting:
                break
            self.run.update(self, loss, clip=self.clip)
        for view in self._chain if self.steps else ():
            self.run.log(**{f"hard_{name}": value for name, value in view.reach().items()})
        if self.run.step in pictures.moments(self.pictures, self.run.total_steps) and not parallel.rank():
            self._draw(parts_of(self.run.sample, self.key)[0])

    def _hunts(self, apart: float) -> bool:
        if self.thresholds is None:
            return True
        low, high = self.thresholds
        return apart <= high if self.hunting else apart < low

    def _loss(self, clean: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
        """The augmentor's loss of a batch, and the disagreement over the global batch."""
        seen, run = self._seen(clean, generator), self.run
        teachers = [self.teacher] if self.teacher else list(run.teachers)
        with evaluating(run.student):
            student = self._logits("student", seen)
            with torch.no_grad():
                before = self._logits("student", clean) if self.first_term == "student-change" else None
        weights = {"lam_s": self.lam_s, "lam_t": self.lam_t, "temperature": self.temperature}
        how: dict[str, Any] = {"first_term": self.first_term, "log": self.log, **weights}
        losses, apart = [], 0.0
        for name in teachers:
            view, known = self._logits(name, seen, grad=True), self._logits(name, clean)
            losses.append(augmentor_loss(student, view, known, before, **how))
            apart += float(disagreement(student.detach(), view.detach(), temperature=self.temperature).mean())
        apart = parallel.total(apart / len(teachers), run.device) / parallel.world()
        return torch.stack(losses).mean(), apart

    def _logits(self, model: str, batch: Batch, grad: bool = False) -> Tensor:
        """[B,C] of all streams that hold images."""
        said = [self.run.ask(model, part, grad=grad)["logits"] for part in parts_of(batch, self.key)]
        if said[0].dim() != 2:
            given = tuple(said[0].shape)
            raise InputError(
                "augmentation", f"{model}: HARD compares class logits", given=given, allowed="[B,C]"
            )
        return torch.cat(said)

    @torch.no_grad()
    def _draw(self, few: Batch) -> None:
        seen = [few, *(self._seen(few, self.run.rng(f"hard.picture.{i}")) for i in range(pictures.ROWS))]
        name = self.teacher or next(iter(self.run.teachers))
        with evaluating(self.run.student):
            said = [
                (self._logits(name, each).argmax(1), self._logits("student", each).argmax(1)) for each in seen
            ]
        kind = "-".join(type(view).__name__.lower() for view in self._chain)
        view = self._chain[0]
        images = [((each[self.key] - view.low) / (view.high - view.low)).cpu() for each in seen]
        path = self.run.folder / "pictures" / f"hard-{kind}-{self.run.step:06d}.png"
        pictures.save(
            path, images, said, f"step {self.run.step}: inputs, and views of them (teacher / student)"
        )

    def get_extra_state(self) -> dict[str, Any]:
        return {"hunting": self.hunting}

    def set_extra_state(self, state: Any) -> None:
        self.hunting = state["hunting"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
