"""Work that ends early keeps what it has: Ctrl-C, and memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from refimpl.errors import UnsupportedError

from . import gpu
from .progress import Progress

INTERRUPTED = 130


def worked(work: Callable[[], None], has_results: Callable[[], Any], progress: Progress) -> dict[str, Any]:
    """Do the work; why it ended early as fields of the result, where there is one already.

    Raises
    ------
    KeyboardInterrupt, MemoryError, or what CuPy raises where memory runs out
        If it ended before the first result.
    """
    try:
        work()
    except KeyboardInterrupt:
        if not has_results():
            raise
        progress.note("interrupted: what was measured until then is shown")
        return {"interrupted": True}
    except Exception as error:
        if not (gpu.out_of_memory(error) and has_results()):
            raise
        shortage = gpu.shortage(error)
        progress.note(f"{shortage}: what was measured until then is shown")
        return {"out_of_memory": shortage}
    finally:
        progress.done()
    return {}


def exit_code(document: Mapping[str, Any]) -> int:
    """That of a command whose result is written.

    Raises
    ------
    UnsupportedError
        If memory ran out before all was measured.
    """
    if "out_of_memory" in document:
        raise UnsupportedError(
            f"{document['out_of_memory']} before all was measured: lower --seq, --batch or the model's size"
        )
    return INTERRUPTED if "interrupted" in document else 0
