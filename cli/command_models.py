"""``effref models``."""

from __future__ import annotations

from pathlib import Path

import click

from . import listing, options, render
from .groups import Commands
from .output import Target
from .progress import Progress


@click.group("models", cls=Commands, short_help="Pretrained models: list and fetch.", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Pretrained models: what can be fetched, and fetching it.

    \b
    Examples:
      effref models list
      effref models fetch minilm-l6
      effref models fetch all
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_models, form=None, path=None, quiet=False)


@command.command("list")
@options.output_options("table", "json", "md")
def list_models(form: str | None, path: Path | None, quiet: bool) -> None:
    """Print what can be fetched, its size and licence, and whether it is here.

    \b
    Example:
      effref models list
    """
    rows = listing.pretrained()
    target = Target.of(form, path)
    target.write_blocks(
        lambda: [render.list_table("pretrained", rows)],
        Progress.on_stderr(quiet),
        json=lambda: render.as_json({"pretrained": rows}),
    )


@command.command("fetch")
@click.argument("names", nargs=-1, required=True, metavar="NAME...|all")
@click.option("--force", is_flag=True, help="Download again what is here.")
@options.quiet_option
def fetch_models(names: tuple[str, ...], force: bool, quiet: bool) -> None:
    """Download models into the user's cache and check their SHA-256.

    \b
    Examples:
      effref models fetch minilm-l6
      effref models fetch all --force
    """
    from refimpl.weights.pretrained import available, fetch

    progress = Progress.on_stderr(quiet)
    for name in available() if names == ("all",) else names:
        click.echo(fetch(name, progress.stage, force))
    progress.done()
