"""The command `coldstill`, put together from the files `*_commands.py`; its errors and interruptions.

A room is imported when its command runs, so that `--help` and the base installation need none of the heavy libraries.
Defaults are read from the function or the settings class that a command calls.
"""

from __future__ import annotations

import atexit
import os
import select
import sys
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from coldstill.common.errors import ColdstillError
from coldstill.common.interrupts import as_interrupted, raising_interrupts
from coldstill.common.visible import visible

from .capture_commands import capture_commands
from .combined_commands import combined_commands
from .dataset_commands import dataset_commands
from .output import show_error
from .training_commands import training_commands


class _Commands(TyperGroup):
    """The commands. Ctrl-C, SIGTERM and SIGHUP end each of them with a sentence on how to resume."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises `SystemExit` with the exit code of a signal."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:  # a missing argument has no message of its own: its name teaches nobody
            error.message = error.message or getattr(error.param, "help", None) or ""
            raise
        except BrokenPipeError as error:  # typer would end every one with code 1 and no word
            if not _reader_is_gone():
                raise RuntimeError("a pipe or connection closed during the command") from error
            if resume := _RESUME.get(ctx.invoked_subcommand or ""):
                with suppress(OSError):
                    show_error(f"\nThe program that reads the output has ended, as `head` does. {resume}")
            raise
        except KeyboardInterrupt as error:
            interrupted = as_interrupted(error, _RESUME.get(ctx.invoked_subcommand or "", ""))
            show_error(f"\n{interrupted}")
            raise SystemExit(interrupted.exit_code) from None


_RESUME = {
    "capture": "Committed units are kept; re-run the same command to resume.",
    "train": "Checkpoints are kept; re-run the same command to resume from the newest one.",
    "rounds": "Finished parts are kept; re-run the same command to resume.",
    "demo": "Finished stages are kept; re-run the same command to resume.",
    **dict.fromkeys(
        ("push", "pull", "import", "merge", "split", "subset"),
        "Files that are complete are kept; re-run the same command to resume.",
    ),
    "export": "Delete the unfinished folder before you re-run the command.",
}
"""What to do after an interruption; the other commands leave nothing behind."""


def _reader_is_gone() -> bool:
    """Whether standard output or standard error is a pipe that no process reads any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # None, or not a file
            poll.register(stream.fileno(), 0)  # POLLERR is reported without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Teach a small model with a big one, without keeping the big one in memory.\n\n"
    "`capture` runs the teacher once and writes a dataset of its next-token distributions. `train` trains students "
    "from that dataset alone. `rounds` repeats both on the student's own answers. `demo` captures and trains on this "
    "machine, without a network.",
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from coldstill.common.packages import __version__, library_versions

    typer.echo(f"coldstill {__version__}")
    for name, version in library_versions().items():
        typer.echo(f"{name} {version}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Print the version, with those of the installed libraries, and exit.",
        ),
    ] = False,
) -> None:
    pass


for commands in (capture_commands, training_commands, combined_commands, dataset_commands):
    app.add_typer(commands)


def run() -> None:
    """Entry point of the command `coldstill`: `main` in a process of its own, which ends with it."""
    try:
        main()
    except SystemExit as end:
        if "ray" not in sys.modules or not isinstance(end.code, int):
            raise
        end_process(end.code)


def end_process(code: int) -> NoReturn:
    """End a process that has driven Ray, with exit code `code`, as Python would, but for destructors of native objects.

    Threads of Ray outlive `ray.shutdown`: gRPC's, and from the second cluster of a process on one for each that still
    collects metrics (Ray 2.60, seen with gdb). Python ends with `exit`, which destroys what they use while they run, so
    that a process whose work was done could end by SIGSEGV, which a scheduler takes for a failure.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(code)


def main() -> None:
    """Run the command of `sys.argv`: prints a `ColdstillError` and exits with code 1; a signal, such as Ctrl-C or
    SIGTERM, ends it with 128 and the signal's number."""
    try:
        with raising_interrupts(exit_at_second=True):
            app(prog_name="coldstill")
    except ColdstillError as error:
        # A message may quote a stranger's dataset, which must not control the terminal.
        show_error(visible(f"{type(error).__name__}: {error}", newline="\n"))
        raise SystemExit(1) from None
