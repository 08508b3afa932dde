"""``effref calibrate``."""

from __future__ import annotations

from pathlib import Path

import click

from . import machines, options, render
from .context import cores
from .output import Target
from .progress import Progress
from .request import device_and_engine


@click.command("calibrate", short_help="Fit the profile of this machine.")
@options.engine_options
@options.gpu_options
@options.dtype_option
@click.option(
    "--seconds", type=options.Number(0, min_open=True), metavar="S", help="Time to measure; more is steadier."
)
@options.output_options("table", "json", "md")
def command(
    device: str | None, engine: str | None, threads: int | None, dtype: str, seconds: float | None, form: str | None,
    path: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Time the engine's ops on this machine, fit and keep its profile, and print how well it fits.

    As json it is the profile itself, which --hardware FILE takes.

    \b
    Examples:
      effref calibrate
      effref calibrate --device gpu --seconds 30
      effref calibrate --threads 1 --format json --output one-thread.json
    """
    target = Target.of(form, path)
    progress = Progress.on_stderr(quiet)
    _, engine = device_and_engine(device, engine)
    hardware = machines.calibrate(engine, threads or cores(), dtype, seconds, progress)
    target.write_blocks(lambda: render.profile_blocks(hardware), progress, json=lambda: hardware.to_json() + "\n")
