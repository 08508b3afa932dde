"""What all plots share: a figure that is written whole or not at all, its colours and marks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refimpl.errors import MissingDependencyError

from .files import whole

# Okabe and Ito's colours, told apart by colour-blind readers; components beyond them are hatched.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#999999")
MARKERS = "osD^vP*X"
_STYLE = {"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}


def require_matplotlib() -> None:
    """Raise MissingDependencyError where plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("plots need Matplotlib: pip install 'effref[plot]'") from error


@contextmanager
def figure(path: Path, inches: tuple[float, float], title: str, description: str) -> Iterator[Any]:
    """A Matplotlib figure to draw on, which becomes the SVG or PNG `path` when the block ends without an error.

    Raises
    ------
    MissingDependencyError
        If Matplotlib is not installed.
    OutputError
        If the file cannot be written.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        made = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(made)
        made.suptitle(title)
        yield made
        with whole(path) as scratch:
            made.savefig(scratch, metadata={"Title": title, "Description": description}, dpi=160)
