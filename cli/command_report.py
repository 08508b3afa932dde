"""``effref report``."""

from __future__ import annotations

from pathlib import Path

import click

from refimpl.errors import ConfigError

from . import options
from .files import check_target, write_text
from .progress import Progress

PATH = click.Path(path_type=Path)
SUFFIXES = (".html", ".htm")


@click.command("report", short_help="Results as one HTML page with charts.")
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="RESULT.json...")
@click.option("-o", "--output", type=PATH, metavar="FILE.html", help="Write there, whole or not at all.  [stdout]")
@options.quiet_option
def command(paths: tuple[Path, ...], output: Path | None, quiet: bool) -> None:
    """Make one HTML page of results: time by component, speed-up, predicted against measured, roofline, fidelity.

    RESULT.json is what measure, estimate or fidelity write with --format json. The page needs nothing but itself: no
    network, no other file.

    \b
    Examples:
      effref measure --output result.json && effref report result.json -o report.html
      effref report results/*.json -o report.html
    """
    from .reporting.page import report

    progress = Progress.on_stderr(quiet)
    if output:
        if output.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"--output {output}: give a file that ends in {' or '.join(SUFFIXES)}")
        check_target(output)
    html = report(paths)
    if output:
        write_text(output, html)
        progress.line(f"wrote {output}")
    else:
        click.echo(html, nl=False)
