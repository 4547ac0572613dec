"""The student: a frozen CLIP-like model, the adapter on its vision side, prototypes, and the fused answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_plugin_sgva_clip.adapter import Adapter, prototypes, recover
from kd_plugin_sgva_clip.clip import TwoTowers
from kd_plugin_sgva_clip.fusion import Variant, fuse, released_search, search
from kd_plugin_sgva_clip.loss import vision_loss
from kdcore import Batch, InputError, Outputs, Student, frozen

SUPPORT = "support"


class SgVA(Student):
    """``clip`` (a student component whose model is ``TwoTowers``) with a trained adapter and a trained prompt.

    Gives ``logits``, the vision scores V = s g p^T; ``image_text``, CLIP's I = s f t^T; ``adapted_text``,
    N = s (g P + b) t^T without gradient to the prompt; ``adapted``, g [B,Dv]. A batch is an episode in training:
    its prototypes p come from the key ``support``, another augmentation of the same images (``variant =
    "released"``: from the images themselves, so each prototype holds its query), and V is 0, its least, for classes
    without a sample. In evaluation p and t are buffers: the means over the training split without augmentation, and
    the text tower's last answer.

    The task's own terms are ``vision``, L_v, and ``text``, L_t = CE(I, y), which trains the prompt alone.
    ``prompt_rate`` weighs L_t: with SGD, the prompt's learning rate over the adapter's; 0 keeps the prompt.
    ``fusion`` is the weight of V in the answer; with ``tune`` it is found on the split ``tune`` after training.
    ``start`` names a teacher of the same architecture whose weights CLIP starts at.
    """

    training_only: ClassVar[tuple[str, ...]] = ("clip.module.text.",)
    prototypes: Tensor
    text: Tensor
    weight: Tensor
    projection: Tensor
    bias: Tensor
    inverse: Tensor

    def __init__(
        self,
        *,
        clip: Student,
        start: str | None = None,
        ratio: Annotated[int, Field(gt=0)] = 2,
        prompt_rate: Annotated[float, Field(ge=0)] = 1.0,
        fusion: Annotated[float, Field(ge=0, le=1)] = 0.5,
        tune: bool = True,
        variant: Variant = "paper",
    ) -> None:
        super().__init__()
        if not isinstance(clip.model, TwoTowers):
            given, allowed = type(clip.model).__name__, "kd_plugin_sgva_clip.TwoTowers"
            raise InputError("student.clip", "the model is no pair of towers", given=given, allowed=allowed)
        self.clip, self.start, self.variant, self.tune = clip, start, variant, tune
        self.prompt_rate = prompt_rate
        self.input_names = tuple(getattr(clip, "input_names", ("input",)))
        frozen(self.towers.encoder)
        self.towers.logit_scale.requires_grad_(False)
        if not prompt_rate:
            frozen(self.towers.text)
        p, b = self.towers.projection()
        self.adapter = Adapter(len(p), ratio)
        t = self._text().detach()
        for name, value in {"projection": p, "bias": b, "inverse": torch.linalg.pinv(p), "text": t}.items():
            self.register_buffer(name, value.clone())
        self.register_buffer("prototypes", p.new_zeros(len(t), len(p)))
        self.register_buffer("weight", torch.tensor(fusion))

    @property
    def towers(self) -> TwoTowers:
        return cast(TwoTowers, self.clip.model)

    def forward(self, batch: Batch) -> Outputs:
        s = self.towers.logit_scale.exp()
        f, g = self._features([batch[name] for name in self.input_names])
        t = self._text() if self.training else self.text
        p = self._episode(batch, g) if self.training and "target" in batch else self.prototypes
        adapted = s * (g @ self.projection + self.bias) @ t.detach().T
        tensors = {"image_text": s * f @ t.T, "adapted_text": adapted, "adapted": g}
        return Outputs(logits=s * g @ p.T, tensors=tensors)

    def task_loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor] | None:
        """``vision`` and ``text``, [B] each; None without labels."""
        if "target" not in batch:
            return None
        y, vision, image_text = batch["target"], outputs["logits"], outputs["image_text"]
        present = torch.bincount(y, minlength=vision.shape[1]) > 0 if self.training else None
        terms = {"vision": vision_loss(vision, y, present)}
        if self.prompt_rate:
            terms["text"] = self.prompt_rate * F.cross_entropy(image_text.float(), y, reduction="none")
        return terms

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        """``logits`` [B,C] are the fused scores."""
        return {"logits": fuse(outputs["logits"], outputs["image_text"], self.weight)}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return self.clip.inputs(batch)

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        return self.clip.shapes(inputs)

    def deploy(self) -> nn.Module:
        """Image encoder, adapter and constants; the text tower stays behind."""
        shipped = copy.deepcopy(self)
        del shipped.towers.text
        return Student.deploy(shipped)

    # ---- the episode ------------------------------------------------------------------------------

    def _features(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The unit embedding f [B,De] and the adapted unit feature g [B,Dv]."""
        f = self.towers.encoder(*inputs)
        return F.normalize(f, dim=-1), self.adapter(recover(f, self.inverse, self.bias))

    def _text(self) -> Tensor:
        return F.normalize(self.towers.text(), dim=-1)

    def _episode(self, batch: Batch, g: Tensor) -> Tensor:
        """The prototypes [C,Dv] of a training batch, on its graph."""
        if self.variant == "paper":
            if SUPPORT not in batch:
                problem = "prototypes need another augmentation of the images, under the key 'support'"
                hint = 'let the data\'s augment(item, rng) add it, or set student.variant = "released"'
                raise InputError("data.source", problem, allowed=sorted(batch), hint=hint)
            others = [batch[name] for name in self.input_names[1:]]
            g = self._features([batch[SUPPORT], *others])[1]
        return prototypes(g, batch["target"], len(self.prototypes))

    # ---- the run ----------------------------------------------------------------------------------

    def setup(self) -> None:
        if self.tune and self.run.source.data.tune is None:
            problem = "the student sgva-clip tunes its fusion weight on the split tune, and there is none"
            raise InputError(
                "data.tune", problem, hint="set data.tune, for example 0.1, or student.tune = false"
            )
        if self.run.recipe is not None and self.run.recipe.train.accumulate > 1:
            problem = "an episode is a batch: micro-batches have other prototypes"
            raise InputError("train.accumulate", problem, hint="take it out, or lower batch_size")
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            problem = "an episode is a batch: each process would have its own prototypes"
            raise InputError("student", problem, hint="train in one process")
        if self.start:
            self._take(self.start)

    @torch.no_grad()
    def _take(self, name: str) -> None:
        teachers = self.run.teachers
        if name not in teachers or not isinstance(teachers[name].model, TwoTowers):
            allowed = [n for n, teacher in teachers.items() if isinstance(teacher.model, TwoTowers)]
            problem = "no teacher of this name that is a pair of towers"
            raise InputError("student.start", problem, given=name, allowed=allowed or "none")
        self.towers.load_state_dict(teachers[name].model.state_dict())
        p, b = self.towers.projection()
        self.projection.copy_(p)
        self.bias.copy_(b)
        self.inverse.copy_(torch.linalg.pinv(p))
        self.text.copy_(self._text())

    def _said(self, split: str) -> dict[str, Tensor]:
        """Scores, features and labels of a split, in eval mode, without augmentation."""
        was_training = self.training
        self.eval()
        rows: list[dict[str, Any]] = []
        for batch in self.run.data(split):
            o = self.run.ask("student", batch)
            rows.append({n: o[n] for n in ("logits", "image_text", "adapted")} | {"target": batch["target"]})
        self.train(was_training)
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def before_eval(self) -> None:
        """Prototypes from all training samples, and the text side's answer, as they now are."""
        shots = self._said("train")
        self.prototypes.copy_(prototypes(shots["adapted"], shots["target"], len(self.prototypes)))
        self.text.copy_(self._text())

    @torch.no_grad()
    def finish(self) -> None:
        """Search the fusion weight on the split ``tune`` (never on val or test)."""
        self.before_eval()
        if not self.tune:
            return
        said = self._said("tune")
        scores = said["logits"], said["image_text"], said["target"]
        if self.variant == "released":
            found, _ = released_search(*scores, self.run.rng("sgva-clip.fusion"))
        else:
            found, _ = search(*scores)
        self.weight.fill_(found)
