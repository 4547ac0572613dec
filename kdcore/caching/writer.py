"""``kd cache``: run a recipe's teacher once over its streams and keep what the recipe's losses read.

The work is cut into shards by the recipe alone. A shard is written under a temporary name and then renamed, so one
that is there is whole; killed and run again, the same shards come out, and those that are there are only checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from kdcore import parallel
from kdcore.building import to_train
from kdcore.caching import header as headers
from kdcore.caching.check import temperature
from kdcore.caching.keys import row_keys
from kdcore.caching.layout import Layout
from kdcore.caching.reader import HEAD, SHARD, Cache
from kdcore.caching.recorder import Part, Recorder, Said
from kdcore.caching.shards import Columns, Shard
from kdcore.caching.shards import write as write_shard
from kdcore.errors import InputError, RunError
from kdcore.folder import difference, discard, locked
from kdcore.progress import Progress
from kdcore.running import stages, versions
from kdcore.stages import StageRun
from kdcore.tables import Positive, Recipe, Table
from kdcore.validation import check_model

SHARD_BYTES = 64 * 2**20


class Options(Table):
    """How values are kept. ``k`` and ``mass`` are of the codec ``topk``; ``dtype`` rounds what is not coded."""

    noun = "option of kd cache"
    codec: Literal["full", "topk"] = "full"
    k: Positive = 56
    mass: Annotated[float, Field(gt=0, lt=1)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Writer:
    """The cache of one teacher, shard by shard."""

    def __init__(self, recorder: Recorder, folder: Path, options: Options) -> None:
        self.recorder, self.folder = recorder, folder
        first = recorder.ask(next(recorder.batches(recorder.work(together=1)[0])))
        self.inputs, topk = sorted(first.read), None
        if options.codec == "topk":
            topk = options.model_dump(include={"k", "mass"})
            topk["temperature"] = temperature(recorder.parts, recorder.name) or 1.0
        self.layout = Layout.of(first.outputs, recorder.needs, topk, options.dtype)
        self.head = first.outputs.unembed if "hidden" in self.layout.shapes else None
        size = sum(piece.nbytes for pieces in self._columns(first).values() for piece in pieces)
        run, recipe, replayed = recorder.run, recorder.recipe, recorder.replayed
        header = {
            "teacher": headers.teacher_of(recorder.name, recipe, recorder.teacher),
            **headers.of_run(recipe, recorder.source, recorder.name, replayed, run.total_steps),
            "layout": asdict(self.layout),
            "inputs": self.inputs,
            "head": self.head and [self.head.softcap, self.head.scale],
            "cut": {"batch_sizes": recorder.sizes, "together": max(SHARD_BYTES // size, 1)},
            "made_with": versions(recipe),  # for the record
            "shards": [],
        }
        self.header: dict[str, Any] = headers.plain(header)

    def run(self, progress: Progress) -> Cache:
        """Write what is not there yet, and open the whole."""
        self._open()
        parts = self.recorder.work(self.header["cut"]["together"])
        with progress.task(f"cache of {self.recorder.name}", len(parts), "shards"):
            for number, part in enumerate(parts):
                self._shard(number, part)
                progress.advance(number + 1)
        headers.write(self.folder, {**self.header, "shards": [part.stream for part in parts]})
        return Cache(self.folder)

    def _open(self) -> None:
        """Start, or go on with what is there; refuse another cache."""
        if (before := headers.read(self.folder)) is not None:
            then, now = ({key: header[key] for key in headers.SAME} for header in (before, self.header))
            if change := difference(then, now):
                problem, hint = f"holds another cache: {change}", "name another --out"
                raise InputError(str(self.folder), problem, hint=hint)
            # the batch size may be another one by now, and what is there was cut by the first
            self.header["cut"] = before["cut"]
            self.recorder.sizes = before["cut"]["batch_sizes"]
        for draft in self.folder.glob(".*.tmp"):
            draft.unlink(missing_ok=True)  # of a process that was killed while it wrote
        headers.write(self.folder, self.header)
        self.identity = headers.identity(self.header)
        if self.head is not None:  # anew each time: what lies there may be damaged, or of a cache before
            named = {"weight": self.head.weight, "bias": self.head.bias}
            columns: Columns = {name: [value] for name, value in named.items() if value is not None}
            write_shard(self.folder / HEAD, columns, self.identity)

    def _shard(self, number: int, part: Part) -> None:
        """Make a shard where there is no whole one."""
        path, identity = self.folder / SHARD.format(number), f"{self.identity} {number}"
        with suppress(RunError):
            Shard(path, identity).check_all()
            return
        self.recorder.run.reseed("cache", part)
        batches = [self._columns(self.recorder.ask(batch)) for batch in self.recorder.batches(part)]
        columns = ((name, [piece for each in batches for piece in each[name]]) for name in batches[0])
        write_shard(path, dict(columns), identity)

    def _columns(self, said: Said) -> Columns:
        if extra := said.read - set(self.inputs):
            raise InputError(f"teacher.{self.recorder.name}", f"reads {sorted(extra)} of some batches only")
        return self.layout.columns(said.batch["id"], row_keys(said.batch, self.inputs), said.outputs)


def write(
    recipe: Recipe, folder: Path | None, teacher: str | None, options: Mapping[str, Any], progress: Progress
) -> Cache:
    """The cache of a recipe's teacher (its only one where none is named) in ``folder``; see ``Options``."""
    if parallel.world() > 1:
        raise InputError("cache", "is made by one process")
    how = check_model(Options, options, "")
    stage = next((each for each in stages(recipe) if each.table.use == "distill"), None)
    if stage is None:
        raise InputError("stage", "none is of use = 'distill': there is no teacher to run")
    names = list(stage.recipe.teacher)
    if teacher not in names and (teacher is not None or len(names) != 1):
        allowed = names or "none: the recipe has no teacher"
        raise InputError("--teacher", "say which", given=teacher, allowed=allowed)
    name = teacher or names[0]
    folder = folder or Path("caches") / f"{recipe.name}-{name}"
    with _alone(folder):
        run = StageRun(stage.recipe, stage.name, folder / "training", {}, progress)
        if name in to_train(run.recipe):
            Writer(
                Recorder(run, name, trained=False), folder, how
            )  # refuses before a training what it would after
        return Writer(Recorder(run, name), folder, how).run(progress)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, which holds a cache or nothing, for this process alone."""
    known, place = (SHARD.partition("{")[0], headers.FILE, HEAD, "training", "."), str(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
            other = [path.name for path in folder.iterdir() if not path.name.startswith(known)]
        except (OSError, RunError) as error:
            reason = getattr(error.__cause__ or error, "strerror", None) or error
            raise InputError(place, f"cannot be used: {reason}") from None
        if other:
            raise InputError(place, "not empty, and no cache", given=other[:3], hint="name another --out")
        stack.callback(discard, folder)  # where nothing was made
        yield
