"""Brings a result to stdout or into files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from refimpl.errors import ConfigError

from . import files, render
from .layout import Block, as_markdown, as_text
from .progress import Progress

PLOTS = (".svg", ".png")


@dataclass(frozen=True)
class Target:
    """Where a result goes and in which form; wrong ones are refused before any work.

    Attributes
    ----------
    form : {"table", "json", "csv", "md"}
    path, plot : Path or None
        None is stdout, and no plot.
    """

    form: str
    path: Path | None = None
    plot: Path | None = None

    @classmethod
    def of(cls, form: str | None, path: Path | None, plot: Path | None = None) -> Target:
        """Check the files; without `form` the suffix of `path` decides."""
        if path:
            files.check_target(path)
        if plot:
            if plot.suffix not in PLOTS:
                raise ConfigError(f"--plot {plot}: give a file that ends in {' or '.join(PLOTS)}")
            files.check_target(plot)
            from .figures import require_matplotlib

            require_matplotlib()
        suffix = render.SUFFIXES.get(path.suffix.lower(), "table") if path else "table"
        return cls(form or suffix, path, plot)

    @property
    def needs_context(self) -> bool:
        """Whether the machine's description is part of the form."""
        return self.form == "json"

    def write(self, document: Mapping[str, Any], blocks: Callable[[], Sequence[Block]], progress: Progress) -> None:
        """Write a result: raw for machines, as `blocks` for people, and as a plot where one is asked for."""
        forms = {"json": lambda: render.as_json(document), "csv": lambda: render.as_csv(document)}
        self.write_blocks(blocks, progress, **forms)
        if self.plot:
            from .plot import draw

            draw(document, self.plot)
            progress.line(f"wrote {self.plot}")

    def write_blocks(self, blocks: Callable[[], Sequence[Block]], progress: Progress, **raw: Callable[[], str]) -> None:
        """Write `blocks` as table or Markdown, or the text that a raw form makes."""
        progress.done()
        words = {"md": as_markdown, "table": as_text}
        text = words[self.form](blocks()) if self.form in words else raw[self.form]()
        if self.path:
            files.write_text(self.path, text)
            progress.line(f"wrote {self.path}")
        else:
            click.echo(text, nl=False)
