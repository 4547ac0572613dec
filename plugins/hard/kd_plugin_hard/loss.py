"""HARD's two objectives on tensors (Nix, Burg, Sinz; arXiv 2305.14890).

t = teacher, s = student, g = augmentor, x~ = g(x). The augmentor maximises lam_s log D(t(x~), s(x~)) -
lam_t D(t(x), t(x~)); the student minimises D(t(x~), s(x~)), which is plain distillation on augmented inputs.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kdcore.functional import at_least_float32

FirstTerm = Literal["disagreement", "student-change"]
FLOOR = 1e-3  # inside the log, so that an augmentor without disagreement still has a gradient of finite size


def disagreement(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """D(t, s) = T^2 KL(softmax(t/T) || softmax(s/T)) of each row, with the gradient of both.

    Logits [..., C] of both; returns [...], at least float32. Not for the student's own loss, whose teacher is
    constant: that is ``kdcore.functional.forward_kl``.
    """
    log_q, log_p = (F.log_softmax(at_least_float32(z) / temperature, -1) for z in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


def augmentor_loss(
    student_view: Tensor,
    teacher_view: Tensor,
    teacher_clean: Tensor,
    student_clean: Tensor | None = None,
    *,
    lam_s: float = 1.0,
    lam_t: float = 1.0,
    temperature: float = 1.0,
    first_term: FirstTerm = "disagreement",
    log: bool = True,
) -> Tensor:
    """What the augmentor minimises: -lam_s log(D_s + 1e-3) + lam_t D_t, D_s and D_t means over the batch; a scalar.

    All [B,C]: ``view`` are the models' logits of augmented inputs, ``clean`` those of the inputs themselves.
    D_s = D(t(x~), s(x~)), or with "student-change" D(s(x), s(x~)); D_t = D(t(x), t(x~)) keeps what the teacher
    sees in the image. ``log = False`` takes D_s as it is. The clean logits are constants.
    """
    if first_term == "student-change" and student_clean is None:
        raise ValueError("first_term = 'student-change' needs student_clean")
    from_ = teacher_view if student_clean is None or first_term == "disagreement" else student_clean.detach()
    gain = disagreement(student_view, from_, temperature=temperature).mean()
    change = disagreement(teacher_view, teacher_clean.detach(), temperature=temperature).mean()
    return -lam_s * ((gain + FLOOR).log() if log else gain) + lam_t * change
