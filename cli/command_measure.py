"""``effref measure``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from . import options, render
from .endings import exit_code
from .output import Target
from .progress import Progress, write
from .request import resolve

GATE_FAILED = 1


@click.command("measure", short_help="Measured beside predicted time.")
@options.shape_options
@options.method_options
@options.input_option
@options.engine_options
@options.gpu_options
@options.hardware_option
@options.timing_options
@options.passes_options
@options.output_options("table", "json", "csv", "md")
@options.plot_option
@click.option(
    "--fail-above",
    type=options.Number(0),
    metavar="PERCENT",
    help="Exit with 1 when the median absolute error of components is larger.",
)
def command(
    baseline: str | None, hardware: str | None, form: str | None, path: Path | None, plot: Path | None, quiet: bool,
    input_file: Path | None, fail_above: float | None, repeats: int | None, warmup: int, max_seconds: float, seed: int,
    l2: str, graph: bool, fuse: bool, **given: Any,
) -> int:  # fmt: skip
    """Run methods and print measured beside predicted time, component by component and in total.

    Errors are (predicted - measured) / measured. The first run on a machine calibrates it.

    \b
    Examples:
      effref measure
      effref measure --method reuse --set reuse.group=3 --seq 512,2048 --plot reuse.svg
      effref measure --model smollm2-135m --phase decode --kv-len 256,1024 --method dense,kvsharer
      effref measure --model smollm2-135m --phase decode --kv-len 256 --graph
      effref measure --model bert-base --device gpu --format json --output bert.json
      effref measure --seq 64,128 --device gpu --graph --l2 cold
      effref measure --seq 512 --fail-above 15
    """
    from .measurement import Source, Timing, default_repeats, measured

    target = Target.of(form, path, plot)
    progress = Progress.on_stderr(quiet)
    source = Source(input_file, own_length=given["seq"] is None and given["phase"] == "prefill")
    request = resolve(**options.request_options(given))
    timing = Timing(repeats or default_repeats(request), warmup, max_seconds, seed, l2, graph, fuse)
    document = measured(request, hardware, source, timing, progress)
    if target.needs_context:
        from .context import completed

        document = completed(document, request.threads)
    target.write(document, lambda: render.measure_blocks(document, request.baselines(baseline)), progress)
    return exit_code(document) or _gate(document, fail_above)


def _gate(document: dict[str, Any], fail_above: float | None) -> int:
    error = document["accuracy"]["components"]["median_abs"]
    if fail_above is None or error is None or 100 * error <= fail_above:
        return 0
    said = f"the median absolute error of components is {100 * error:.1f} %, above {fail_above:g} %"
    write(sys.stderr, f"effref: {said}\n")
    return GATE_FAILED
