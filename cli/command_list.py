"""``effref list``."""

from __future__ import annotations

from pathlib import Path

import click

from . import listing, options, render
from .output import Target
from .progress import Progress


@click.command("list", short_help="Methods, models, hardware, components.")
@click.argument("kind", type=click.Choice(tuple(listing.KINDS)), required=False)
@options.output_options("table", "json", "md")
def command(kind: str | None, form: str | None, path: Path | None, quiet: bool) -> None:
    """Print the methods, models, hardware presets or components, one line each; all without a name.

    \b
    Examples:
      effref list
      effref list hardware
    """
    target = Target.of(form, path)
    found = {name: listing.KINDS[name]() for name in ([kind] if kind else listing.KINDS)}
    target.write_blocks(
        lambda: [render.list_table(name, rows) for name, rows in found.items()],
        Progress.on_stderr(quiet),
        json=lambda: render.as_json(found),
    )
