"""``kd cache``: run a recipe's teacher once over its streams and keep what the recipe's losses read.

The work is cut into shards by the recipe alone. A shard is written under a temporary name and then renamed, so one
that is there is whole; killed and run again, the same shards come out, and those that are there are only checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdcore import building, parallel
from kdcore import recipe as recipes
from kdcore.caching import header as headers
from kdcore.caching.check import changes_inputs, temperature_of
from kdcore.caching.codec import TopKCodec
from kdcore.caching.keys import Watched, row_keys, tensors_digest
from kdcore.caching.layout import Layout
from kdcore.caching.reader import HEAD, Cache
from kdcore.caching.shards import Rows, Shard
from kdcore.caching.shards import write as write_shard
from kdcore.checkpoint import save_tensors
from kdcore.data import Key, Keyed, shard
from kdcore.errors import InputError, RunError
from kdcore.folder import difference
from kdcore.kinds import Teacher
from kdcore.progress import Progress
from kdcore.stages import StageRun, train_teacher
from kdcore.tables import Recipe, StageTable
from kdcore.types import Batch, Outputs, Unembed

SHARD_BYTES = 64 * 2**20
Codec = Literal["full", "topk"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Options:
    """How values are kept. ``k`` and ``mass`` are of the codec ``topk``; ``dtype`` rounds what is not coded."""

    codec: Codec = "full"
    k: int = 56
    mass: float | None = None
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("codec", get_args(Codec)), ("dtype", (None, *get_args(Dtype)))):
            if (given := getattr(self, name)) not in allowed:
                raise InputError(name, "no such way to keep values", given=given, allowed=allowed)
        if self.mass is not None and not 0 < self.mass < 1:
            raise InputError("mass", "is a share of the probability", given=self.mass, allowed="0 < mass < 1")


@dataclass(frozen=True)
class Part:
    """The work of one shard: batches of a stream, steps of the run, or the small sample of the dry run."""

    kind: Literal["once", "replay", "sample"]
    stream: str | None = None
    first: int = 0
    last: int = 0


@dataclass
class Said:
    """One answer of the teacher, with what it was asked."""

    batch: Batch
    outputs: Outputs
    read: set[str] = field(default_factory=set)


class Recorder:
    """A live teacher in a prepared run, asked batch by batch."""

    def __init__(self, run: StageRun, name: str) -> None:
        self.recipe, self.name, self.source = run.recipe, name, run.source
        table = run.recipe.teacher[name]
        trained = train_teacher(run, name)[0] if name in building.to_train(run.recipe) else None
        self.parts = building.assemble(run.recipe, run.source, run.builder())
        self.teacher: Teacher = self.parts.teachers[name]
        if not self.teacher.live or self.teacher.saved:
            raise InputError(
                f"teacher.{name}",
                f"{table.use!r} changes during a run, or is cached already: nothing to keep",
            )
        if trained is not None:
            self.teacher.load_state_dict(trained.state_dict())
        self.weights = tensors_digest(dict(self.teacher.state_dict()))
        self.distiller, self.context = run.context(self.parts)
        self.needs = self._needs()
        self.taps = self.parts.taps.get(name)
        self._seen: Said | None = None
        self.teacher.register_forward_pre_hook(self._asked)
        self.teacher.register_forward_hook(self._answered)

    def _needs(self) -> set[str]:
        if any(each.grad_through for _, each in self.parts.components()):
            raise InputError(f"teacher.{self.name}", "a component sends gradient through it: a cache cannot")
        needs = self.parts.needs.get(self.name)
        if not needs:
            raise InputError(f"teacher.{self.name}", "no loss and no router of the recipe reads it")
        return needs

    def _asked(self, module: Any, args: tuple[Batch, ...]) -> tuple[Batch, ...]:
        watched = Watched(args[0])
        self._seen = Said(watched, Outputs(), watched.read)
        return (watched,)

    def _answered(self, module: Any, args: Any, outputs: Outputs) -> None:
        if self._seen is not None:
            self._seen.outputs = outputs

    @torch.no_grad()
    def ask(self, part: Batch) -> Said:
        """What the teacher says, as a step of the run would ask it: precision, view, taps and all."""
        stop = self.taps is not None and self.needs <= set(self.taps.names)
        self.distiller.train()
        with autocast(self.recipe.train.precision, self.context.device.type):
            heard = self.distiller.ask(self.name, part, stop=stop)
        assert self._seen is not None
        said, self._seen = self._seen, None
        names = self.taps.names if self.taps is not None else ()
        said.outputs.tensors = {**said.outputs.tensors, **{path: heard.tensors[path] for path in names}}
        said.batch, said.read = Batch(dict(dict.items(said.batch))), said.read - {"id"}
        return said


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device, dtypes[precision]) if precision in dtypes else nullcontext()


class Writer:
    """The cache of one teacher, part by part."""

    def __init__(self, recorder: Recorder, folder: Path, options: Options) -> None:
        self.recorder, self.folder, self.options = recorder, folder, options
        run, recipe, source = recorder.context, recorder.recipe, recorder.source
        run.steps_per_epoch = run.order.steps_per_epoch
        run.total_steps = recipe.train.steps or (recipe.train.epochs or 1) * run.steps_per_epoch
        self.sizes = source.batch_sizes
        self.changing = [n for n, each in recorder.parts.augmentations.items() if changes_inputs(each)]
        self._refuse_moving()
        self.replayed = [n for n, s in source.streams.items() if self.changing or hasattr(s, "augment")]
        first = recorder.ask(next(self._batches(self._first_part()))[1])
        self.inputs = sorted(first.read)
        self.layout = Layout.of(first.outputs, recorder.needs, self._codec(), options.dtype)
        self.together = max(SHARD_BYTES // max(self._rows(first).bytes, 1), 1)  # batches a shard
        self.head = first.outputs.unembed if "hidden" in self.layout.shapes else None
        self.header = self._header()
        self.identity = headers.identity({"format": f"kdcore.cache {headers.VERSION}", **self.header})

    def run(self, progress: Progress) -> Cache:
        """Write what is not there yet, and open the whole."""
        self._open()
        parts, shards = list(self._parts()), {}
        with progress.task(f"cache of {self.recorder.name}", len(parts), "shards"):
            for index, part in enumerate(parts):
                name = f"shard-{index:05d}.safetensors"
                shards[name] = {"rows": self._shard(self.folder / name, part), "stream": part.stream}
                progress.advance(index + 1)
        headers.write(self.folder, {**self.header, "shards": shards, "complete": True})
        return Cache(self.folder)

    def _shard(self, path: Path, part: Part) -> int:
        """Make a shard where there is no whole one; the number of its rows."""
        if path.exists():
            try:
                there = Shard(path, self.identity)
                there.check_all()
                return len(there)
            except RunError:
                path.unlink()
        self.recorder.context.reseed("cache", part)
        rows = Rows.joined([self._rows(self.recorder.ask(batch)) for _, batch in self._batches(part)])
        write_shard(path, rows, self.identity)
        return len(rows.id)

    def _rows(self, said: Said) -> Rows:
        keys = row_keys(said.batch, self.inputs)
        if extra := said.read - set(self.inputs):
            raise InputError(f"teacher.{self.recorder.name}", f"reads {sorted(extra)} of some batches only")
        return self.layout.rows(said.batch["id"], keys, said.outputs)

    # ---- which batches ------------------------------------------------------------------------------

    def _parts(self) -> Iterator[Part]:
        together = self.together
        if self.replayed:
            yield Part("sample")
        for name, data in self.recorder.source.streams.items():
            if name not in self.replayed:
                count = -(-len(data) // self.sizes[name])
                for first in range(0, count, together):
                    yield Part("once", name, first, min(first + together, count))
        steps = self.recorder.context.total_steps if self.replayed else 0
        for first in range(0, steps, together):
            yield Part("replay", None, first, min(first + together, steps))

    def _first_part(self) -> Part:
        names = [n for n in self.recorder.source.streams if n not in self.replayed]
        return Part("once", names[0], 0, 1) if names else Part("replay", None, 0, 1)

    def _batches(self, part: Part) -> Iterator[tuple[str, Batch]]:
        """(stream, batch) of a part's work, on the device."""
        if part.kind == "once":
            assert part.stream is not None
            yield from self._once(part.stream, part.first, part.last)
        elif part.kind == "sample":
            yield from self._sample()
        else:
            for step in range(part.first, part.last):
                yield from self._step(step)

    def _once(self, name: str, first: int, last: int) -> Iterator[tuple[str, Batch]]:
        source = self.recorder.source
        data, size = source.streams[name], self.sizes[name]
        for start in range(first * size, last * size, size):
            keys = [Key(name, 0, place) for place in range(start, min(start + size, len(data)))]
            yield name, Keyed({name: data}, source.seed).__getitems__(keys).to(self.recorder.context.device)

    def _sample(self) -> Iterator[tuple[str, Batch]]:
        """What a run tries before its first step: a few samples, as they are and as they are augmented."""
        run, distiller = self.recorder.context, self.recorder.distiller
        distiller.eval()
        run.step = 0
        run.reseed("dry run")
        batch = run.sample
        raw = self._streams(batch)
        for augmentation in self.recorder.parts.augmentations.values():
            batch = augmentation(batch)
        yield from raw
        yield from self._streams(batch) if self.changing else ()

    def _step(self, step: int) -> Iterator[tuple[str, Batch]]:
        """A step's batch as the run will see it."""
        run, source = self.recorder.context, self.recorder.source
        self.recorder.distiller.train()
        run.step = step
        run.order.begin_epoch(run.epoch)
        run.reseed("step", step, shared=False)
        batch = (
            Keyed(source.streams, source.seed).__getitems__(shard(run.order.keys(step), 0, 1)).to(run.device)
        )
        for augmentation in self.recorder.parts.augmentations.values():
            batch = augmentation(batch)
        yield from self._streams(batch)

    def _streams(self, batch: Batch) -> list[tuple[str, Batch]]:
        names = batch.streams if batch.parts else tuple(self.recorder.source.streams)
        return [(name, batch.part(name)) for name in names if name in self.replayed]

    def _refuse_moving(self) -> None:
        for name in self.changing:
            each = self.recorder.parts.augmentations[name]
            learns = [e for e in ("before_step", "after_step", "on_epoch") if hasattr(type(each), e)]
            if each.own_optimizer is not None or learns:
                problem = "what it makes of a sample depends on the training: no cache can hold it"
                raise InputError(f"augmentation {name}", problem)

    # ---- the header ---------------------------------------------------------------------------------

    def _codec(self) -> Callable[[int], TopKCodec] | None:
        if self.options.codec == "full":
            return None
        heard = [slot for slot in self.recorder.parts.losses if self.recorder.name in slot.teachers]
        reading = [slot for slot in heard if "teacher.logits" in slot.loss.wants()]
        for slot in reading:
            if not slot.loss.topk:
                problem = "needs all logits of its teacher"
                raise InputError(f"loss {slot.name}", problem, given="--codec topk", hint="--codec full")
        found = {temperature_of(slot.loss) for slot in reading}
        if len(found) > 1:
            problem = "losses of several temperatures: a top k is taken at one"
            raise InputError("loss", problem, given=sorted(found), hint="--codec full")
        temperature = found.pop() if found else 1.0
        return lambda classes: TopKCodec(classes, self.options.k, self.options.mass, temperature)

    def _header(self) -> dict[str, Any]:
        recorder, recipe, codec = self.recorder, self.recorder.recipe, self.layout.codec
        said: dict[str, Any] = {"use": self.options.codec, "dtype": self.options.dtype, "temperature": None}
        if codec is not None:
            said |= {
                "classes": codec.classes,
                "k": codec.k,
                "mass": codec.mass,
                "temperature": codec.temperature,
            }
        header = {
            "teacher": headers.teacher_of(
                recorder.name, recipe.teacher[recorder.name], recipe, recorder.weights
            ),
            "vocabulary": headers.vocabulary_of(recorder.source),
            "data": headers.data_of(recorder.source.table, recorder.source),
            "view": recipe.teacher[recorder.name].view,
            "augmentation": headers.augmentation_of(recipe, self.replayed, recorder.context.total_steps),
            "codec": said if codec is not None or self.options.codec == "full" else {**said, "use": "full"},
            "outputs": self.layout.shapes,
            "taps": sorted(recorder.taps.names) if recorder.taps is not None else [],
            "inputs": self.inputs,
            "precision": recipe.train.precision,
            "head": None if self.head is None else [self.head.softcap, self.head.scale],
            "head_digest": None if self.head is None else tensors_digest(_weights(self.head)),
            "cut": {"batch_sizes": self.sizes, "together": self.together},
            "made_with": headers.made_with(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(header))
        return plain

    def _open(self) -> None:
        """Start, or go on with what is there; refuse a folder that holds something else."""
        before = None
        try:
            before = headers.read(self.folder)
        except InputError:
            if not list(self.folder.glob("shard-*.safetensors")):
                raise
        if before is not None:
            keys = headers.SAME
            then, now = ({k: tree[k] for k in keys} for tree in (before, self.header))
            if change := difference(then, now):
                problem = f"holds another cache: {change}"
                raise InputError(str(self.folder), problem, hint="name another --out")
            # the batch size may be another one by now, and what is there was cut by the first
            cut = self.header["cut"] = before.get("cut", self.header["cut"])
            self.sizes, self.together = cut["batch_sizes"], cut["together"]
        for draft in self.folder.glob(".*.tmp"):
            draft.unlink(missing_ok=True)  # of a process that was killed while it wrote
        headers.write(self.folder, {**self.header, "shards": {}, "complete": False})
        if self.head is not None:  # anew each time: what lies there may be damaged, or of a cache before
            save_tensors(self.folder / HEAD, _weights(self.head))


def _weights(head: Unembed) -> dict[str, Tensor]:
    named = {"weight": head.weight, "bias": head.bias}
    return {name: value for name, value in named.items() if value is not None}


def write(
    recipe: Recipe, folder: Path | None, teacher: str | None, options: Options, progress: Progress
) -> Cache:
    """The cache of a recipe's teacher (its only one where none is named) in ``folder``."""
    if parallel.world() > 1:
        raise InputError("cache", "is made by one process")
    view, stage = _stage(recipe)
    names = list(view.teacher)
    if teacher not in names and (teacher is not None or len(names) != 1):
        raise InputError(
            "--teacher", "say which", given=teacher, allowed=names or "none: the recipe has no teacher"
        )
    name = teacher or names[0]
    folder = folder or Path("caches") / f"{recipe.name}-{name}"
    _may_use(folder)
    run = StageRun(view, stage, folder / "training", {}, progress)
    return Writer(Recorder(run, name), folder, options).run(progress)


def _stage(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe as its first standard stage lays it out."""
    for index, table in enumerate(recipe.stage or [StageTable(use="distill", name="distill")]):
        if table.use == "distill":
            return recipes.parse_stage(recipe, table, f"stage.{index}"), recipes.stage_name(table, index)
    raise InputError(
        "stage",
        "no stage of use = 'distill': there is no teacher to run",
        given=[s.use for s in recipe.stage],
    )


def _may_use(folder: Path) -> None:
    known = ("shard-", headers.FILE, HEAD, "training", ".")
    try:
        other = (
            [path.name for path in folder.iterdir() if not path.name.startswith(known)]
            if folder.exists()
            else []
        )
    except OSError as error:
        raise InputError(str(folder), f"cannot be used: {error.strerror}") from None
    if other:
        raise InputError(str(folder), "not empty, and no cache", given=other[:3], hint="name another --out")
