"""The ``effref`` command: finds the subcommand, and turns every failure into one line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from refimpl.errors import EffrefError

from . import __version__
from .groups import Commands
from .progress import drop, write

# command -> module of this package whose attribute `command` it is; loaded when asked for
COMMANDS = {
    "list": ".command_list",
    "estimate": ".command_estimate",
    "measure": ".command_measure",
    "calibrate": ".command_calibrate",
    "crossover": ".command_crossover",
    "fidelity": ".command_fidelity",
    "report": ".command_report",
    "prepare": ".command_prepare",
    "guideline": ".command_guideline",
    "train-thresholds": ".command_train_thresholds",
    "explain": ".command_explain",
    "models": ".command_models",
    "maps": ".command_maps",
    "memo": ".command_memo",
    "sweep": ".command_sweep",
    "audit": ".command_audit",
}
UNSERVED, INTERRUPTED = 2, 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ReaderLeftError(Exception):
    """Who read stdout has left, as with ``| head``."""


@contextmanager
def _before_click() -> Iterator[None]:
    """Take what click would answer itself: with an empty line, and with 1, which is the exit code of a gate."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.Abort from None
    except BrokenPipeError as error:
        raise ReaderLeftError from error


class Effref(Commands):
    """A group that loads its commands late and never shows a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = import_module(COMMANDS[cmd_name], __package__).command
        return found

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _before_click():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _before_click():
            return super().invoke(ctx)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        if args is None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a process of its own
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and leaves no half file
        sys.stdout = sys.stdout or open(os.devnull)  # noqa: SIM115  # closed: what is written there fails
        given = list(sys.argv[1:] if args is None else args)
        sys.exit(_exit_code(lambda: super(Effref, self).main(given or ["--help"], "effref", standalone_mode=False)))


def _exit_code(run: Any) -> int:
    """Run the command; what happened as an exit code, and as one line on stderr where it failed."""
    try:
        code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except EffrefError as error:
        return _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:  # a group alone, as `effref memo`
        click.echo(error.ctx.get_help())
        return 0
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except (ReaderLeftError, BrokenPipeError):
        drop(sys.stdout)
        return 0
    except io.UnsupportedOperation as error:
        if sys.stdout.writable():
            return _failed(error)
        return _fail("stdout is closed: open it, or give a file with --output where the command has it")
    except OSError as error:
        if error.errno not in NO_ROOM:
            return _failed(error)
        drop(sys.stdout)
        return _fail(f"cannot write {error.filename or 'the result'}: {error.strerror}; make room, or write elsewhere")
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """What nobody foresaw: memory that ran out, a GPU that failed, or a bug."""
    from refimpl.engines.cuda.failures import of_cupy

    from . import gpu

    if gpu.out_of_memory(error):
        return _fail(f"{gpu.shortage(error)}: lower --seq, --batch or the model's size, or take --method flash")
    if sys.flags.dev_mode:
        raise error
    if of_cupy(error):
        return _fail(f"the GPU failed ({error}): 'nvidia-smi' shows whether it works and who else uses it")
    shown = "'python -X dev -m effref ...' shows where; please report it"
    return _fail(f"this is a bug in effref ({type(error).__name__}: {error}): {shown}")


def _fail(message: str, code: int = UNSERVED) -> int:
    write(sys.stderr, f"effref: error: {' '.join(message.split())}\n")
    return code


@click.group(cls=Effref, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="effref", message="%(prog)s %(version)s")
def main() -> None:
    """What efficient-attention methods cost and save: predicted, measured, component by component.

    \b
    Start with:
      effref estimate                            predicted, at once, no kernel is run
      effref measure                             predicted beside measured on this machine
      effref estimate --seq 4096 --method reuse
    """
