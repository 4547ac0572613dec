"""The command line. Listing and help import no torch; an input error is one screen with exit code 2.

Its rooms: ``doing`` runs what a recipe asks for, ``looking`` shows what there is, ``writing`` makes and checks
plugins. What several commands share is in ``common``.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from kdcore.cli import doing, looking, writing
from kdcore.cli.common import Commands
from kdcore.errors import KDError


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--debug, with any command, shows where an error was raised.",
)
@click.version_option(package_name="kdcore", prog_name="kd")
def kd() -> None:
    """Knowledge distillation from recipes."""


for _command in (
    *(doing.run, doing.resume, doing.compare, doing.cache, doing.export, doing.bench),
    *(looking.list_, looking.show, looking.search, looking.plugins_, writing.plugin),
    *(looking.doctor, looking.schema),
):
    kd.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """The entry point: errors in words and their exit codes."""
    given = sys.argv[1:] if arguments is None else arguments
    args = [each for each in given if each != "--debug"]
    code = _run(args, debug=len(args) < len(given))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave(code)
    raise SystemExit(code)


def leave(code: int) -> NoReturn:
    """End one of several processes at once, its output written.

    While the interpreter is torn down, a thread of the process group at times aborts a run that is finished.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(args: list[str], debug: bool) -> int:
    """What a command returns (None for 0), or the exit code of its error."""
    try:
        return int(kd.main(args, prog_name="kd", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("stopped", err=True)
        return 130
    except (KDError, OSError) as error:
        if debug:
            raise
        words, code = str(error), getattr(error, "exit_code", 1)
        if isinstance(error, OSError):  # a full disk behind the output, a folder that may not be read
            words = f"{error.filename or 'the output'}: {error.strerror or error}"
        click.echo(f"error: {words}", err=True)
        return int(code)
