"""Codecs: how a row of logits is kept. ``full`` keeps the bits; ``topk`` the largest entries in few bits.

A token of ``topk`` is one string of bits, all tokens of one count equally long: the ids in rising order
(Elias-Fano: the low bits of each, the high parts in unary), a coarse code of each log-probability on an even grid
from 0 to the token's least, finer bits for the ``HEAD`` largest, that least one, and the rest's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kdcore.errors import InputError, RunError
from kdcore.types import TopK

RANGE = 16.0  # nats: what is less likely than exp(-16) is kept as that
COARSE, FINE, HEAD = 6, 8, 12  # bits of a code, more bits for the HEAD largest
LEAST, REST = 8, 16  # bits of the least log-probability, of the rest's
CHUNK = 2**26  # logits at a time


@dataclass(frozen=True)
class TopKCodec:
    """The top ``k`` of softmax(logits / temperature) over ``classes``; with ``mass`` only as many as hold that much.

    With ``mass`` a token keeps k, k/2, k/4, ... or 1 entries: the fewest that reach it, so that tokens of one
    count are coded together.
    """

    classes: int
    k: int = 56
    mass: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.k < self.classes:
            hint = "--codec full" if self.classes <= 64 else None
            allowed = f"1 to {self.classes - 1}, one less than the classes"
            raise InputError("k", "does not leave a rest", given=self.k, allowed=allowed, hint=hint)

    @cached_property
    def counts(self) -> list[int]:
        """The numbers of entries that a token may have, falling."""
        found = [self.k]
        while self.mass is not None and found[-1] > 1:
            found.append(-(-found[-1] // 2))
        return found

    def width(self, count: int) -> int:
        """Bytes of a token with so many entries."""
        return -(-sum(values * bits for values, bits in self._fields(count)) // 8)

    def widths(self, sizes: Tensor) -> Tensor:
        """Bytes of each token, int64, by its place in ``counts``."""
        return torch.tensor([self.width(count) for count in self.counts], device=sizes.device)[sizes.long()]

    def encode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[N, V] logits as bytes, one token after the other, and each token's place in ``counts`` [N], uint8."""
        top, ids, rest = self._top(logits)
        sizes = self._sizes(top)
        data = torch.zeros(int(self.widths(sizes).sum()), dtype=torch.uint8)
        for count, tokens, places in self._groups(sizes):
            here = tokens.to(top.device)
            left_out = top[here, count:].logsumexp(-1)  # joins the rest; -inf where there is none
            joined = torch.logaddexp(rest[here], left_out)
            data[places] = self._encode(ids[here, :count], top[here, :count], joined).cpu()
        return data, sizes

    def decode(self, data: Tensor, sizes: Tensor | None = None) -> TopK:
        """What ``encode`` was given, [N, k]: an absent entry is -inf and repeats the id of the token's first one."""
        if sizes is None or self.mass is None:  # all have k
            return TopK(*self._decode(data.view(-1, self.width(self.k)), self.k))
        ids = torch.zeros(len(sizes), self.k, dtype=torch.int64, device=data.device)
        logp = torch.full((len(sizes), self.k), -math.inf, device=data.device)
        rest = torch.zeros(len(sizes), device=data.device)
        for count, tokens, places in self._groups(sizes):
            some, logp[tokens, :count], rest[tokens] = self._decode(data[places], count)
            ids[tokens] = some[:, :1]
            ids[tokens, :count] = some
        return TopK(ids, logp, rest)

    def _groups(self, sizes: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(count, tokens [n], places of their bytes [n, width]) for each count that some token has."""
        widths = self.widths(sizes)
        start = widths.cumsum(0) - widths
        for kind, count in enumerate(self.counts):
            tokens = (sizes == kind).nonzero().flatten()
            if len(tokens):
                within = torch.arange(self.width(count), device=sizes.device)
                yield count, tokens, start[tokens].unsqueeze(1) + within

    def _top(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and ids of the top k, falling, and the log-probability of all others."""
        z = logits.float() / self.temperature
        top = z.topk(self.k, -1)
        others = z.scatter(-1, top.indices, -math.inf).logsumexp(-1)
        whole = torch.logaddexp(top.values.logsumexp(-1), others)
        if not bool(whole.isfinite().all()):  # as a code it would be a probability like any other
            raise RunError("the teacher's logits are no distribution: NaN, or an infinity, is among them")
        return top.values - whole.unsqueeze(-1), top.indices, others - whole

    def _sizes(self, top: Tensor) -> Tensor:
        """The place in ``counts`` of the fewest entries that hold ``mass``."""
        if self.mass is None or self.k == 1:
            return torch.zeros(len(top), dtype=torch.uint8)
        held = top.double().exp().cumsum(-1)
        reached = torch.stack([held[:, count - 1] >= self.mass for count in self.counts[1:]], -1)
        return reached.cpu().cumprod(-1).sum(-1).to(torch.uint8)

    def _low(self, count: int) -> int:
        """How many low bits of an id are kept beside its unary part."""
        return max((self.classes // count).bit_length() - 1, 1)

    def _fields(self, count: int) -> list[tuple[int, int]]:
        """How many values of how many bits: the ids' unary and low parts, coarse and fine codes, the least, the rest."""
        low = self._low(count)
        unary = count + ((self.classes - 1) >> low)
        return [(unary, 1), (count, low), (count, COARSE), (min(count, HEAD), FINE), (1, LEAST), (1, REST)]

    def _encode(self, ids: Tensor, logp: Tensor, rest: Tensor) -> Tensor:
        count, low = ids.shape[1], self._low(ids.shape[1])
        least = (-logp[:, -1:]).div(RANGE).mul(2**LEAST - 1).ceil().clamp(1, 2**LEAST - 1).long()
        ids, order = ids.sort(-1)
        unit = (logp.gather(-1, order) / -_scale(least)).clamp(0, 1)
        high = (ids >> low) + torch.arange(count, device=ids.device)
        unary = ids.new_zeros(len(ids), self._fields(count)[0][0])
        unary.scatter_(-1, high, 1)
        steps = 2**COARSE - 1
        coarse = (unit * steps).round().long()
        within = ((unit * steps - coarse + 0.5) * 2**FINE).long().clamp(0, 2**FINE - 1)
        fine = within.gather(-1, _head(coarse))
        last = ((-rest).clamp(0, RANGE).div(RANGE).sqrt() * (2**REST - 1)).round().long().unsqueeze(-1)
        widths = (width for _, width in self._fields(count))
        return _packed(zip((unary, ids, coarse, fine, least, last), widths, strict=True))

    def _decode(self, strings: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        low, steps = self._low(count), 2**COARSE - 1
        unary, ids, coarse, fine, least, last = _unpacked(strings, self._fields(count))
        high = unary.nonzero()[:, 1].view(-1, count) - torch.arange(count, device=unary.device)
        place = _head(coarse)
        exact = (coarse.gather(-1, place) + (fine + 0.5) / 2**FINE - 0.5) / steps
        unit = (coarse / steps).scatter(-1, place, exact.clamp(0, 1))
        rest = last.squeeze(-1) / (2**REST - 1)
        return (high << low) | ids, -unit * _scale(least), -RANGE * rest**2


def log_error(least: float, *, head: bool) -> float:
    """The most by which a kept log-probability may be wrong, before all are scaled to sum to one.

    ``least`` is the token's smallest, down to -RANGE; ``head``: of its ``HEAD`` largest.
    """
    step = (RANGE / (2.0**LEAST - 1) - least) / (2.0**COARSE - 1)
    return step / 2 / (2.0**FINE if head else 1.0)


def _scale(least: Tensor) -> Tensor:
    return least * float(RANGE / (2.0**LEAST - 1))


def _head(coarse: Tensor) -> Tensor:
    """The places of the HEAD likeliest by their coarse codes, the first of equals; both sides find the same."""
    return coarse.sort(dim=-1, stable=True).indices[:, :HEAD]


def _packed(fields: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Values [N, m] of so many bits each, one field after the other, as bytes [N, ...], filled up with zeros."""
    parts = [
        ((values.unsqueeze(-1) >> _shifts(bits, values.device)) & 1).flatten(1) for values, bits in fields
    ]
    row = torch.cat(parts, -1)
    row = torch.nn.functional.pad(row, (0, -row.shape[-1] % 8)).unflatten(-1, (-1, 8))
    data: Tensor = (row << _shifts(8, row.device)).sum(-1).to(torch.uint8)
    return data


def _unpacked(strings: Tensor, fields: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """The values [N, m], int64, of each field, of which there are m of so many bits."""
    row = ((strings.unsqueeze(-1) >> _shifts(8, strings.device).to(torch.uint8)) & 1).flatten(1)
    lengths = [count * bits for count, bits in fields]
    for (count, bits), part in zip(fields, row[:, : sum(lengths)].split(lengths, -1), strict=True):
        powers = torch.exp2(_shifts(bits, row.device).float())
        yield (part.reshape(-1, bits).float() @ powers).long().view(-1, count)  # below 2^24: exact


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(bits - 1, -1, -1, device=device)
