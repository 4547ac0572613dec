"""From Python: ``kdcore.run``, ``kdcore.check``, ``kdcore.build`` and ``kdcore.cache``."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcore import folder as folders
from kdcore import parallel, running
from kdcore import recipe as recipes
from kdcore.building import Builder
from kdcore.errors import Interrupted, RunError
from kdcore.progress import Progress
from kdcore.signals import graceful
from kdcore.source import LOCK
from kdcore.tables import Recipe

RecipeLike = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what its stages gave (``results`` as in results.json)."""

    folder: Path
    results: dict[str, Any]

    @property
    def student(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def metrics(self) -> dict[str, float]:
        """The student's metrics on the test split."""
        return dict(self.results.get("test", {}).get("student", {}))


@contextmanager
def _opened(
    where: RecipeLike, overrides: Iterable[str], seed: int | None, plugins_only: bool
) -> Iterator[tuple[recipes.Source, Recipe]]:
    """A recipe, read and checked as text. In the block its modules can be imported, and errors have their line."""
    source = recipes.read(where, [*overrides, *([] if seed is None else [f"seed={seed}"])])
    recipe = recipes.check(source)
    with recipes.located(source), folders.beside(source):
        if plugins_only:
            recipes.refuse_code(source.tree)
        try:
            yield source, recipe
        except SystemExit as error:  # would end the process as if all were done
            raise RunError(f"code that the recipe names called sys.exit({error.code!r})") from error


def check(
    where: RecipeLike, overrides: Iterable[str] = (), *, plugins_only: bool = False, quiet: bool = True
) -> Recipe:
    """All three phases: text and names, signatures, then models, taps and shapes on one small real batch.

    Warnings go to standard error, unless ``quiet``.
    """
    with _opened(where, overrides, None, plugins_only) as (_, recipe):
        running.check(recipe, Progress(quiet).say)
        return recipe


def run(
    where: RecipeLike,
    *,
    out: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    plugins_only: bool = False,
) -> Result:
    """Run a recipe in a run folder (``out``, or runs/NAME-TIME) and return what came of it.

    ``resume`` goes on with the folder's run: its locked recipe must equal this one, or ``force`` be set.
    Raises InputError before anything is written when the recipe is wrong.
    """
    with _opened(where, overrides, seed, plugins_only) as (source, recipe), parallel.group():
        default = Path("runs") / f"{recipe.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        folder = (Path(out) if out else default).absolute()
        progress = Progress(quiet or bool(parallel.rank()))
        if not (resume and os.path.exists(folder / LOCK)):
            running.check(recipe, progress.say)
            if resume:
                progress.say(f"nothing to resume in {folder}: starting")
        with nullcontext() if parallel.rank() else folders.opened(folder, source, resume, force):
            parallel.barrier()
            try:
                return Result(folder, running.run(recipe, folder, progress, force))
            except Interrupted as stop:
                raise Interrupted(f"{stop}\n  hint    kd resume {folder}") from None


def build(kind: str, name: str, **params: Any) -> Any:
    """An instance of an installed component: ``kdcore.build("loss", "pld", temperature=2.0)``."""
    return Builder(seed=0).make(kind, name, params, name)


def cache(
    where: RecipeLike,
    *,
    teacher: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    quiet: bool = True,
    plugins_only: bool = False,
    **options: Any,
) -> Any:
    """Run a recipe's teacher once and keep what its losses read; see ``kdcore.caching``.

    ``options``: ``codec``, ``k``, ``mass``, ``dtype``. Returns the ``kdcore.caching.Cache``; its folder is the
    ``path`` of ``use = "cached"``. Goes on with what is there.
    """
    from kdcore.caching import write

    with _opened(where, overrides, seed, plugins_only) as (_, recipe), graceful():
        recipes.check_signatures(recipe)
        folder = None if out is None else Path(out)
        return write(recipe, folder, teacher, options, Progress(quiet))
