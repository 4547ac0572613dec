"""Run recipes one after the other in every process that torchrun started: ``torchrun on_ranks.py FOLDER``.

Each FOLDER/NAME.toml is run into FOLDER/NAME-run; what it raised goes to FOLDER/NAME.error. A file NAME.stop
holds a step at which the last process gets a signal, NAME.resume the name of the run to go on with.
"""

import sys
from pathlib import Path

from conftest import stop_at

import kdcore
from kdcore import parallel
from kdcore.cli import leave
from kdcore.distill import Distiller
from kdcore.errors import KDError


def main(folder: Path) -> None:
    real = Distiller.train_step
    with parallel.group():
        for path in sorted(folder.glob("*.toml")):
            stop, resume = path.with_suffix(".stop"), path.with_suffix(".resume")
            name = resume.read_text() if resume.exists() else path.stem
            Distiller.train_step = stop_at(int(stop.read_text())) if stop.exists() else real
            try:
                kdcore.run(path, out=folder / f"{name}-run", resume=resume.exists())
            except KDError as error:
                path.with_suffix(f".error{parallel.rank()}").write_text(f"{error.exit_code} {error}", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
