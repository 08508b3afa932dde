"""Writes files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refimpl.errors import EffrefError


class OutputError(EffrefError, OSError):
    """A file cannot be written."""


def check_target(path: Path) -> None:
    """Raise OutputError where `path` cannot be written; called before long work."""
    folder = path.parent  # functions of os.path never raise, methods of Path do
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; give the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"{path} is not a plain file; leave --output away to write to stdout")
    if not os.path.isdir(folder):
        raise OutputError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {folder}")
    try:
        _scratch(path).exists()
    except OSError as error:  # a name that is too long
        raise OutputError(f"cannot write {path}: {error.strerror}; give a shorter one") from error


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffix, that becomes it when the block ends without an error.

    Raises
    ------
    OutputError
        If the file cannot be written. Nothing is left behind.
    """
    check_target(path)
    scratch = _scratch(path)
    try:
        yield scratch
        os.replace(scratch, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; see `whole`."""
    with whole(path) as scratch:
        scratch.write_text(text, "utf-8", newline="\n")
