"""The sampler (algorithm 1): K steps on a mixture of domains, then both models measured and the mixture renewed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kd_plugin_ddk.mixture import direct, discrepancy, smoothed
from kdcore import Augmentation, Batch, InputError, Outputs
from kdcore.data import key_seed


class DomainSampler(Augmentation):
    """Draws the training samples of the next ``every`` (K) steps, domain i with probability r_i.

    ``key``: the batch value int64 [B] that says each sample's domain, 0 to N - 1. At a border the student's
    perplexity l_S on the first ``samples`` held-out samples of each domain is measured (eval mode, no gradient), the
    teacher's l_T once; then r <- ``smoothed(r, l_S / l_T, alpha)``, starting at ``direct``. The first interval
    follows the corpus, as the paper's random D_0. A domain that is used up begins anew. ``mixture``: ``direct`` is the
    ablation without smoothing, ``equal`` and ``natural`` (the corpus) the baselines without measurement.

    An interval is an epoch of the run. State: r, the perplexities, and how far each domain has been read; the
    interval's samples are the run's. ``of``: which teacher, where there are several.
    """

    changes_inputs = False

    def __init__(
        self,
        *,
        every: Annotated[int, Field(ge=1)] = 1000,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
        mixture: Literal["smoothed", "direct", "equal", "natural"] = "smoothed",
        samples: Annotated[int, Field(ge=1)] = 500,
        split: Literal["val", "tune"] = "val",
        key: str = "domain",
        of: str | None = None,
    ) -> None:
        super().__init__()
        self.draw_every, self.alpha, self.mixture = every, alpha, mixture
        self.samples, self.split, self.key, self.of = samples, split, key, of
        self.r: list[float] = []  # of the last border; empty before the first
        self.teacher_perplexity: list[float] = []
        self.student_perplexity: list[float] = []
        self.cursor: list[int] = []
        self.pools: list[Tensor] = []

    @property
    def measures(self) -> bool:
        return self.mixture in ("smoothed", "direct")

    def setup(self) -> None:
        """Which samples each domain has, in an order drawn once by the run's seed."""
        domain = self._domains("train")
        for i in range(int(domain.max()) + 1):
            pool = (domain == i).nonzero().flatten()
            generator = torch.Generator().manual_seed(key_seed(self.run.seed, "ddk", i))
            self.pools.append(pool[torch.randperm(len(pool), generator=generator)])
        self.cursor = [0] * len(self.pools)
        self._check()

    def _check(self) -> None:
        if empty := [i for i, pool in enumerate(self.pools) if not len(pool)]:
            raise InputError("data.source", "a domain has no training sample", given=empty)
        if not self.measures:
            return
        if (held := self._domains(self.split).unique().tolist()) != list(range(len(self.pools))):
            problem = f"the split {self.split!r} must have samples of the domains that train has"
            raise InputError("data.source", problem, given=held, allowed=f"0 to {len(self.pools) - 1}")
        names = [self.of] if self.of else list(self.run.teachers)
        if len(names) != 1 or names[0] not in self.run.teachers:
            allowed = list(self.run.teachers)
            raise InputError("augmentation.of", "name one teacher", given=self.of, allowed=allowed)
        self.of = names[0]

    def _domains(self, split: str) -> Tensor:
        """int64 [n]: the domain of each sample of a split, in the split's order."""
        found = []
        for batch in self.run.data(split):
            if self.key not in batch:
                raise InputError("data.source", f"the batch has no {self.key!r}", allowed=sorted(batch))
            found.append(batch[self.key].cpu())
        return torch.cat(found)

    # ---- an interval ------------------------------------------------------------------------------

    def draw(self, size: int, epoch: int) -> Tensor:
        """int64 [K * batch size]: D_t. Asked once an interval; measures, renews r, and moves the domains' cursors."""
        if self.measures:
            self._renew()
        shares = self.shares(epoch)
        self.run.log(**{f"ddk_r{i}": share for i, share in enumerate(shares.tolist())})
        source = self.run.source
        count = (self.draw_every or 1) * source.batch_sizes[source.epoch]
        domain = torch.multinomial(shares, count, replacement=True, generator=self.run.rng("ddk"))
        found = torch.empty(count, dtype=torch.int64)
        for i, pool in enumerate(self.pools):
            mine = (domain == i).nonzero().flatten()
            places = self.cursor[i] + torch.arange(len(mine))
            found[mine] = pool[places % len(pool)]
            self.cursor[i] += len(mine)
        return found

    def shares(self, interval: int) -> Tensor:
        """float64 [N]: the probabilities of this interval's domains."""
        N = len(self.pools)
        if self.mixture == "equal":
            return torch.full((N,), 1 / N, dtype=torch.float64)
        if self.mixture == "natural" or interval == 0:
            sizes = torch.tensor([len(pool) for pool in self.pools], dtype=torch.float64)
            return sizes / sizes.sum()
        return torch.tensor(self.r, dtype=torch.float64)

    def _renew(self) -> None:
        """Equation 1 at the first border and without smoothing, else equation 2."""
        if not self.teacher_perplexity:
            self.teacher_perplexity = self.perplexity(str(self.of)).tolist()
        self.student_perplexity = self.perplexity("student").tolist()
        ratio = discrepancy(torch.tensor(self.student_perplexity), torch.tensor(self.teacher_perplexity))
        if self.mixture == "direct" or not self.r:
            r = direct(ratio)
        else:
            r = smoothed(torch.tensor(self.r, dtype=torch.float64), ratio, self.alpha)
        self.r = r.tolist()
        self.run.log(**{f"ddk_ratio{i}": value for i, value in enumerate(ratio.tolist())})

    @torch.no_grad()
    def perplexity(self, model: str) -> Tensor:
        """float64 [N]: exp of the mean cross-entropy a token, on the first ``samples`` held-out samples of each domain."""
        N, student = len(self.pools), self.run.student
        total, count, seen = (torch.zeros(N, dtype=torch.float64) for _ in range(3))
        was_training = student.training
        student.eval()
        try:
            for batch in self.run.data(self.split):
                part = batch.rows(self._first(batch[self.key].cpu(), seen).to(batch[self.key].device))
                if len(part):
                    loss, tokens = self._of(self.run.ask(model, part), part)
                    total.index_add_(0, part[self.key].cpu(), loss)
                    count.index_add_(0, part[self.key].cpu(), tokens)
        finally:
            student.train(was_training)
        return (total / count.clamp_min(1)).exp()

    def _first(self, domain: Tensor, seen: Tensor) -> Tensor:
        """Which rows are among the first ``samples`` of their domain; ``seen`` is counted on."""
        hot = torch.nn.functional.one_hot(domain, len(seen)).double()
        place = ((hot.cumsum(0) + seen) * hot).sum(1)
        seen += hot.sum(0)
        return (place <= self.samples).nonzero().flatten()

    def _of(self, said: Outputs, part: Batch) -> tuple[Tensor, Tensor]:
        """([B], [B]) float64: summed cross-entropy and supervised tokens of each sample."""
        loss = self.run.task_terms(said, part)
        target = said.target if said.target is not None else part.get("target")
        if not isinstance(loss, Tensor) or loss.dim() == 0 or target is None:
            raise InputError("task", "gives no cross-entropy a token or sample to measure domains by")
        loss = loss.double().reshape(len(part), -1).cpu()
        there = (target != -100).reshape(len(part), -1).cpu()
        return loss.sum(1), there.double().sum(1)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            n: list(getattr(self, n)) for n in ("r", "teacher_perplexity", "student_perplexity", "cursor")
        }

    def set_extra_state(self, state: Any) -> None:
        for name, value in state.items():
            setattr(self, name, list(value))

    def extra_repr(self) -> str:
        return f"every={self.draw_every}, alpha={self.alpha}, {self.mixture}"
