"""``effref crossover``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, render, render_crossover
from .endings import exit_code
from .output import Target
from .parsing import parse_range
from .progress import Progress


@click.command("crossover", short_help="The length from which a method beats a baseline.")
@click.option("--over", default="length", show_default=True, metavar="NAME", help="What varies: length or batch.")
@click.option(
    "--range", "limits", callback=options.parsed(parse_range), metavar="FROM:TO", help="[16:16384; of batches 1:64]"
)
@click.option("--measure", is_flag=True, help="Look for the place with the clock, too.")
@options.shape_options
@options.method_option("reuse")
@options.set_option
@options.baseline_option
@options.input_option
@options.engine_options
@options.gpu_options
@options.hardware_option
@click.option(
    "--max-seconds", type=options.Number(0, min_open=True), metavar="S", default=120.0, show_default=True,
    help="For measuring, all methods and baselines together.",
)  # fmt: skip
@options.seed_option
@options.output_options("table", "json", "md")
@options.plot_option
def command(
    over: str, limits: tuple[int, int] | None, measure: bool, baseline: str | None, input_file: Path | None,
    hardware: str | None, max_seconds: float, seed: int, form: str | None, path: Path | None, plot: Path | None,
    quiet: bool, **given: Any,
) -> int:  # fmt: skip
    """Find the length (or batch) from which a method is faster than dense and flash.

    Solved on the cost model, with the band that the calibration's errors leave; with --measure also looked for with
    the clock, by halving the distance.

    \b
    Examples:
      effref crossover --method reuse
      effref crossover --method reuse --model conformer-m --baseline flash --measure --plot crossover.svg
      effref crossover --method kvsharer --phase decode --over batch --kv-len 1024
    """
    from . import crossing
    from .measurement import Source, Timing

    target, progress = Target.of(form, path, plot), Progress.on_stderr(quiet)
    asked = options.request_options(given)
    request, axis = crossing.planned(
        asked.pop("model", None), asked.pop("method", "reuse"), asked.pop("params", None), over, limits, asked
    )
    timing = Timing(crossing.PAIRS, 1, max_seconds, seed) if measure else None
    named = crossing.baselines(request, baseline)
    document = crossing.found(request, axis, named, hardware, Source(input_file), timing, progress)
    if target.needs_context:
        from .context import completed

        document = completed(document, request.threads)
    target.write_blocks(lambda: render_crossover.blocks(document), progress, json=lambda: render.as_json(document))
    if plot:
        from .plot_crossover import draw

        draw(document, plot)
        progress.line(f"wrote {plot}")
    return exit_code(document)
