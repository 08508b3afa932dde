"""``effref estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import machines, options, render
from .estimation import default_device, estimated
from .output import Target
from .progress import Progress
from .request import resolve


@click.command("estimate", short_help="Predicted cost; no kernel is run.")
@options.shape_options
@options.method_options
@options.engine_options
@options.hardware_option
@options.output_options("table", "json", "csv", "md")
@options.plot_option
@click.option("--graph", is_flag=True, help="Times of recorded passes: CUDA graphs, or decoding steps on the CPU.")
@click.option(
    "--energy",
    is_flag=False,
    flag_value="int8-dram",
    metavar="[NAME]",
    help="Also joules, from published figures: int8-dram, int8-dram-high, int8-sram, fp16-dram or fp32-dram.",
)
def command(
    baseline: str | None, hardware: str | None, form: str | None, path: Path | None, plot: Path | None, quiet: bool,
    graph: bool, energy: str | None, **given: Any,
) -> None:  # fmt: skip
    """Predict FLOPs, bytes and seconds, component by component; no kernel is run.

    \b
    Examples:
      effref estimate
      effref estimate --seq 4096 --method reuse --set reuse.group=3
      effref estimate --model emformer-rnnt-base --method folding --phase decode --energy
      effref estimate --model bert-base --seq 2^9:2^14 --hardware h100-sxm --format csv
    """
    target = Target.of(form, path, plot)
    progress = Progress.on_stderr(quiet)
    named = machines.find(hardware)
    given["device"] = given["device"] or default_device(named, given["engine"])
    request = resolve(**options.request_options(given))
    document = estimated(request, named or hardware, progress, energy, graph)
    if target.needs_context:
        from .context import context

        document["context"] = context(request.threads)
    baselines = request.baselines(baseline)
    target.write(document, lambda: render.estimate_blocks(document, baselines), progress)
