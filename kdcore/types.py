"""What passes between the core and a plugin: component descriptors, batches, outputs, data.

Nothing here imports torch at run time, so a plugin's entry-point module stays light.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kdcore.errors import KDError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KINDS = ("teacher", "student", "router", "loss", "augmentation", "stage", "probe", "exporter")
CONVENTIONS = ("hard_term", "t_squared", "zero_at_teacher", "couples_batch", "mean_over_classes", "topk")
_NAME = re.compile(r"[a-z][a-z0-9-]*(\.[a-z][a-z0-9_-]*)?")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Component:
    """What a hook answers with: a name, and where the thing is found when it is needed.

    ``name`` is the plugin's slug or ``slug.part``; ``target`` an import string ``module:attribute``.
    """

    name: str
    target: str
    summary: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"component name {self.name!r}: expected 'slug' or 'slug.part' in lower case")
        if not isinstance(self.target, str) or not _TARGET.fullmatch(self.target):
            raise ValueError(f"component {self.name!r}: target {self.target!r} is not 'module:attribute'")


def conventions(
    *,
    hard_term: bool = False,
    t_squared: bool = True,
    zero_at_teacher: bool = False,
    couples_batch: bool = False,
    mean_over_classes: bool = False,
    topk: bool = False,
) -> Callable[[F], F]:
    """Declare where a loss function differs from the defaults (DESIGN section 5); read by the core.

    ``hard_term``: the labels' term is inside, so the core drops its own. ``t_squared``: scaled by the
    square of its temperature, if it has one. ``zero_at_teacher``: 0 where student equals teacher.
    ``couples_batch``: a sample's term depends on the other samples of the batch. ``mean_over_classes``:
    divided by the number of classes, where the default is their sum. ``topk``: a divergence that the core
    may compute from a teacher's top k (``Outputs.topk``) instead of its logits.
    """

    declared = dict(locals())  # the arguments, by name

    def mark(function: F) -> F:
        vars(function).update(declared)
        return function

    return mark


class Batch(dict[str, Any]):
    """Values by name: tensors whose first axis is B, or lists of length B; always ``id`` (int64 [B]).

    A batch of several streams (labelled, unlabelled, ...) has one batch a stream in ``parts`` and no
    values of its own; a batch of one stream is its own only part.
    """

    def __init__(
        self, values: Mapping[str, Any] | None = None, parts: Mapping[str, Batch] | None = None
    ) -> None:
        super().__init__(values or {})
        self.parts: dict[str, Batch] = dict(parts or {})

    def part(self, name: str) -> Batch:
        if not self.parts:
            return self
        if name not in self.parts:
            raise KDError(f"the batch has no stream {name!r}; it has {sorted(self.parts)}")
        return self.parts[name]

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.parts) or ("main",)

    def __len__(self) -> int:  # the number of samples, the only length that callers ask for
        if self.parts:
            return sum(len(part) for part in self.parts.values())
        return len(self["id"]) if "id" in self else 0

    def __bool__(self) -> bool:
        return True

    def copy(self) -> Batch:
        """A shallow copy: tensors are shared, keys may be replaced without harm."""
        return Batch(self, {name: part.copy() for name, part in self.parts.items()})

    def _map(self, change: Callable[[Any], Any]) -> Batch:
        return Batch(
            {key: change(value) for key, value in self.items()},
            {name: part._map(change) for name, part in self.parts.items()},
        )

    def rows(self, index: Tensor) -> Batch:
        """The samples at ``index`` (int64 or bool [B]) of a batch of one stream."""
        import torch

        chosen = index.nonzero().flatten() if index.dtype == torch.bool else index
        places = chosen.tolist()
        return self._map(lambda v: v[chosen] if hasattr(v, "index_select") else [v[i] for i in places])

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda v: v.to(device, non_blocking=True) if hasattr(v, "to") else v)

    def chunks(self, count: int) -> list[Batch]:
        """``count`` batches of near equal size (never empty), stream by stream, in order."""
        if count == 1:
            return [self]
        size, total = min(count, *map(len, self.parts.values() or [self])), len(self)
        if self.parts:
            cut = {name: part.chunks(size) for name, part in self.parts.items()}
            return [Batch(parts={name: c[i] for name, c in cut.items()}) for i in range(size)]
        edges = [total * i // size for i in range(size + 1)]
        return [self._map(itemgetter(slice(a, b))) for a, b in itertools.pairwise(edges)]


class Unembed(NamedTuple):
    """An output layer that was not applied: logits = softcap(scale * (hidden @ weight.T + bias)).

    softcap(z) = c tanh(z / c), None for none (Gemma's ``final_logit_softcapping``); ``scale`` is Cohere's
    ``logit_scale`` or Granite's 1 / ``logits_scaling``. ``kdcore.functional.chunked`` reads it as it is.
    """

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self) -> Tensor:
        """All of them, [..., V], float32 or wider; the product runs under the caller's autocast."""
        import torch
        from torch.nn.functional import linear

        raw = linear(self.hidden, self.weight, self.bias)
        z = raw.to(torch.promote_types(raw.dtype, torch.float32))
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class TopK(NamedTuple):
    """A distribution by its largest entries: ``rest`` is the log-probability of all others together."""

    ids: Tensor  # int64 [..., k]
    logp: Tensor  # [..., k]
    rest: Tensor  # [...]


@dataclass
class Outputs:
    """What a model says of a batch.

    ``logits`` [B,C], [B,L,V] or [B,C,H,W]; ``mask`` (bool) and ``target`` (int64) are aligned with the
    logits' positions; ``tensors`` holds everything else by name, taps included; ``rows`` (int64) says
    which samples of the batch a routed teacher answered for, None for all.
    """

    logits: Tensor | None = None
    mask: Tensor | None = None
    target: Tensor | None = None
    unembed: Unembed | None = None
    topk: TopK | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            have = sorted([*self.tensors, *(n for n in FIELDS if n in self)])
            hint = nearest(name, have) or ""
            raise KDError(f"the model gives no {name!r}; it gives {have}. {hint}".strip())
        return self.tensors[name] if name in self.tensors else getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or (name in FIELDS and getattr(self, name) is not None)

    def named(self) -> Iterator[tuple[str, Any]]:
        """Every tensor that is there, by name."""
        for name in ("logits", "mask", "target"):
            if name in self:
                yield name, self[name]
        yield from self.tensors.items()

    def at(self, index: Any) -> Outputs:
        """The same outputs for some samples of the first axis (slice, bool or int64 index)."""
        head = self.unembed and self.unembed._replace(hidden=self.unembed.hidden[index])
        taken = replace(self, unembed=None, rows=None)._map(lambda tensor: tensor[index])
        return replace(taken, unembed=head)

    def detach(self) -> Outputs:
        return self._map(lambda tensor: tensor.detach())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        return replace(self, **{f.name: _each(getattr(self, f.name), change) for f in fields(self)})


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` of a tensor, and of all tensors in a dict or a named tuple."""
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(_each(part, change) for part in value))
    return change(value) if hasattr(value, "detach") else value


FIELDS = frozenset(f.name for f in fields(Outputs)) - {"tensors"}


@dataclass
class Data:
    """What a data source returns: map-style data sets whose items are dicts of values.

    An item's ``id`` must be stable from run to run; where it is absent the index is used. ``train`` may
    be several streams by name. ``tune`` is carved from train when the source gives none. Randomness in
    an item comes only from ``dataset.augment(item, rng)``, which the core calls with a
    ``numpy.random.Generator`` keyed by (run seed, epoch, id, stream).
    ``preprocessing`` (a list of named steps), ``labels`` and ``licence`` travel with the exported student;
    where there are steps, ``raw(ids)`` gives the model's inputs by name as a receiver has them before the
    steps, so that an export can try them. ``tokenizer`` is what made ids of text, as text itself (a
    tokenizer's JSON): a cache of teacher signals refuses another one.
    """

    train: Any  # Dataset | Mapping[str, Dataset]
    val: Any
    test: Any
    tune: Any = None
    classes: int | None = None
    labels: Sequence[str] | None = None
    preprocessing: Sequence[Mapping[str, Any]] = ()
    raw: Callable[[Sequence[int]], Mapping[str, Any]] | None = None
    description: str = ""
    licence: str = ""
    tokenizer: str | None = None
