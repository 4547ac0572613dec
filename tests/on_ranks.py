"""Run recipes one after the other in every process that torchrun started: ``torchrun on_ranks.py FOLDER``.

Each FOLDER/NAME.toml is run into FOLDER/NAME-run; what it raised goes to FOLDER/NAME.error. A file NAME.stop
holds a step at which the last process gets a signal; NAME.resume makes the run go on with what is there.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import kdcore
from kdcore import parallel
from kdcore.distill import Distiller
from kdcore.errors import KDError
from kdcore.signals import Stop


def stop_at(step: int) -> Any:
    """``Distiller.train_step`` that sends a signal to the last process when the student has made ``step`` steps."""
    real = Distiller.train_step

    def train_step(self: Distiller, data: Any, optim_wrapper: Any) -> Any:
        logs = real(self, data, optim_wrapper)
        if self.run.step == step and self.parts.losses and parallel.rank() == parallel.world() - 1:
            Stop.note(signal.SIGTERM, None)
        return logs

    return train_step


def main(folder: Path) -> None:
    real = Distiller.train_step
    with parallel.group():
        for path in sorted(folder.glob("*.toml")):
            stop = path.with_suffix(".stop")
            Distiller.train_step = stop_at(int(stop.read_text())) if stop.exists() else real
            try:
                kdcore.run(path, out=folder / f"{path.stem}-run", resume=path.with_suffix(".resume").exists())
            except KDError as error:
                path.with_suffix(f".error{parallel.rank()}").write_text(f"{error.exit_code} {error}", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
