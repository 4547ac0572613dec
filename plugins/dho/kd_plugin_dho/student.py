"""The two-headed student and its inference rule (DHO, arXiv 2505.07675 v2, equation 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcore import Batch, InputError, Outputs, Student
from kdcore.checkpoint import load_tensors

ALPHAS = tuple(0.05 * i for i in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
Width = Annotated[int, Field(gt=0)]


def mix(z_ce: Tensor, z_kd: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    """log p of p = alpha softmax(z_ce) + (1 - alpha) softmax(z_kd / beta), eq. 8: probabilities are mixed, not logits.

    Logits [..., C] of both heads, ``alpha`` in [0, 1], ``beta`` > 0; returns [..., C], whose softmax is p.
    """
    alpha = torch.as_tensor(alpha, dtype=torch.float32, device=z_ce.device)
    parts = [
        F.log_softmax(z_ce.float(), -1) + alpha.clamp_min(1e-30).log(),
        F.log_softmax(z_kd.float() / beta, -1) + (1 - alpha).clamp_min(1e-30).log(),
    ]
    return torch.logsumexp(torch.stack(parts), 0)


def search(z_ce: Tensor, z_kd: Tensor, target: Tensor) -> tuple[float, float, float]:
    """(alpha, beta, accuracy) of the best of ALPHAS x BETAS on logits [N,C] and labels [N].

    The first of equals in the authors' order: beta outside, alpha inside. Probabilities as in ``mix``.
    """
    p_ce, best = z_ce.float().softmax(-1), (0.0, 1.0, 0.0)
    for beta in BETAS:
        p_kd = (z_kd.float() / beta).softmax(-1)
        for alpha in ALPHAS:
            right = (alpha * p_ce + (1 - alpha) * p_kd).argmax(-1) == target
            accuracy = right.float().mean().item()
            if accuracy > best[2]:
                best = alpha, beta, accuracy
    return best


class DualHead(Student):
    """``backbone`` with two linear heads on its embedding [B,d]: ``logits`` and ``z_kd``, both [B,C].

    ``head`` is the path of the backbone's own classifier, which the two heads take the place of; where the
    backbone has none (``head = ""``) its output ``embedding`` is the embedding, and ``width`` and ``classes``
    must be given. ``alpha`` and ``beta`` are the inference rule's (``mix``); with ``tune`` they are searched
    after training on the split ``tune``, and are buffers either way, so part of the weights and of an
    exported graph. ``scale`` puts the teacher head into a cosine space, z_kd = scale * h_kd(g / |g|), as the
    authors' CLIP students have it with 100. ``heads`` starts both heads at a safetensors' ``weight`` [C,d],
    such as text embeddings, with zero bias. ``tied`` makes both heads one: the single-head baseline.
    """

    backbone: Student
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        *,
        backbone: Student,
        head: str = "head",
        embedding: str = "logits",
        width: Width | None = None,
        classes: Width | None = None,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
        beta: Annotated[float, Field(gt=0)] = 1.0,
        tune: bool = True,
        scale: Annotated[float, Field(gt=0)] | None = None,
        heads: str | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if tied and scale is not None:
            raise InputError(
                "student.scale", "tied heads share one space", given=scale, hint="take out scale or tied"
            )
        self.backbone, self.embedding, self.tune, self.scale = backbone, embedding, tune, scale
        taken = _take_out(backbone.model, head) if head else None
        width = width or getattr(taken, "in_features", None)
        classes = classes or getattr(taken, "out_features", None)
        if width is None or classes is None:
            raise InputError(
                "student.width",
                "nothing says how wide the embedding is, or how many classes there are",
                hint="give width and classes",
            )
        self.ce_head = nn.Linear(width, classes)
        self.kd_head = self.ce_head if tied else nn.Linear(width, classes)
        if heads:
            self._start(load_tensors(heads, "student.heads")["weight"])
        self.register_buffer("alpha", torch.tensor(alpha))
        self.register_buffer("beta", torch.tensor(beta))
        self.input_names = backbone.input_names

    def forward(self, batch: Batch) -> Outputs:
        """``logits`` are the label head's: what the task's loss and any other loss on logits trains."""
        g = self.backbone(batch)[self.embedding]
        if self.scale is None:
            z_kd = self.kd_head(g)
        else:
            z_kd = self.scale * self.kd_head(F.normalize(g, dim=-1))
        return Outputs(logits=self.ce_head(g), tensors={"z_kd": z_kd, "embedding": g})

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        """``logits`` [B,C] are the logarithms of the mixed probabilities; their softmax is the mixture."""
        return {"logits": mix(outputs["logits"], outputs["z_kd"], self.alpha, self.beta)}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return self.backbone.inputs(batch)

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        return self.backbone.shapes(inputs)

    def setup(self) -> None:
        if self.tune and self.run.source.data.tune is None:
            raise InputError(
                "data.tune",
                "the student dho tunes alpha and beta on the split tune, and there is none",
                hint="set data.tune, for example 0.1, or student.tune = false",
            )

    @torch.no_grad()
    def finish(self) -> None:
        """Search alpha and beta on the split ``tune`` (never on val or test)."""
        if not self.tune:
            return
        was_training = self.training
        self.eval()
        said = [(self.run.ask("student", batch), batch["target"]) for batch in self.run.data("tune")]
        self.train(was_training)
        columns = zip(*((o["logits"], o["z_kd"], target) for o, target in said), strict=True)
        alpha, beta, _ = search(*(torch.cat(column) for column in columns))
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)

    @torch.no_grad()
    def _start(self, weight: Tensor) -> None:
        for head in (self.ce_head, self.kd_head):
            if head.weight.shape != weight.shape:
                raise InputError(
                    "student.heads", f"weight {tuple(weight.shape)}", allowed=str(tuple(head.weight.shape))
                )
            head.weight.copy_(weight)
            head.bias.zero_()


def _take_out(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, whose place an identity takes."""
    parent, _, name = path.rpartition(".")
    try:
        taken = model.get_submodule(path)
    except AttributeError:
        names = [n for n, _ in model.named_modules() if n]
        raise InputError(
            "student.head", "no module at this path of the backbone", given=path, allowed=names
        ) from None
    setattr(model.get_submodule(parent), name, nn.Identity())
    return taken
