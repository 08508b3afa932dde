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
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a plain file; leave --output away to write to stdout")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {folder}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffix, that becomes it when the block ends without an error.

    Raises
    ------
    OutputError
        If the file cannot be written. Nothing is left behind.
    """
    check_target(path)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
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
