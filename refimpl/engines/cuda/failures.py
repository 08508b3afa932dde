"""What CuPy raises: which errors are its own, and what they say."""

from __future__ import annotations

MODULES = ("cupy", "cupy_backends")  # of the errors that CUDA, its libraries and the compiler report


def of_cupy(error: BaseException) -> bool:
    """Whether CuPy raised it: an error of CUDA, of one of its libraries or of the compiler."""
    return type(error).__module__.split(".")[0] in MODULES


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
