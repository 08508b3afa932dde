"""``effref sweep``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import options
from .endings import INTERRUPTED
from .parsing import parse_names
from .progress import Progress


def _example(ctx: click.Context, _parameter: click.Parameter, given: bool) -> None:
    if given:
        from .grid import EXAMPLE

        click.echo(EXAMPLE, nl=False)
        ctx.exit()


@click.command("sweep", short_help="A design space, estimated or measured: one row a point.")
@click.argument("grid", type=click.Path(path_type=Path), metavar="GRID.toml")
@click.option(
    "--example", is_flag=True, is_eager=True, expose_value=False, callback=_example, help="Print a grid to begin with."
)
@click.option(
    "--mode", metavar="NAME", default="estimate", show_default=True,
    help="estimate, or measure, which goes on where an earlier run stopped.",
)  # fmt: skip
@click.option("--pareto", metavar="NAMES", help="List what nothing dominates: time,memory and, measured, fidelity.")
@click.option("--cluster", metavar="ADDRESS", help="Of a Dask scheduler, as tcp://10.0.0.1:8786.")
@options.engine_options
@options.gpu_options
@options.repeats_option
@options.warmup_option
@click.option(
    "--max-seconds", type=options.Number(0, min_open=True), metavar="S", default=10.0, show_default=True,
    help="For the passes of each point.",
)  # fmt: skip
@options.seed_option
@options.passes_options
@click.option(
    "--format", "form", type=click.Choice(("table", "csv", "json", "md")), help="Of --pareto's list.  [table]"
)
@click.option("--output", "path", type=options.OUTPUT, metavar="FILE", help="Rows to FILE.csv or FILE.parquet.")
@options.quiet_option
def command(
    grid: Path, mode: str, pareto: str | None, cluster: str | None, device: str | None, engine: str | None,
    threads: int | None, repeats: int | None, warmup: int, max_seconds: float, seed: int, l2: str, graph: bool,
    fuse: bool, form: str | None, path: Path | None, quiet: bool,
) -> int:  # fmt: skip
    """Estimate or measure every point of a design space and write one row for each.

    The axes are the lists of GRID.toml: models and their sizes, methods and their parameters, lengths, batches, dtypes,
    phases, hardware. Points that cannot be served are left out and counted with the reason. Without --output and
    --pareto the rows go to stdout as CSV.

    \b
    Examples:
      effref sweep --example > grid.toml
      effref sweep grid.toml --output points.csv
      effref sweep grid.toml --pareto time,memory
      effref sweep grid.toml --mode measure --output measured.csv
      effref sweep grid.toml --mode measure --output measured.csv --cluster tcp://10.0.0.1:8786
      effref sweep grid.toml --mode measure --output recorded.csv --device gpu --graph
    """
    from . import grid as axes
    from . import render_sweep
    from .context import cores
    from .sweeping import Plan, Timing, estimated, opened

    progress = Progress.on_stderr(quiet)
    objectives = parse_names(pareto) if pareto is not None else ()
    if form and not objectives:
        raise click.UsageError("--format is of --pareto's list; rows are CSV, or what the suffix of --output says")
    timing = Timing(repeats, warmup, max_seconds, seed, l2, graph, fuse)
    plan = Plan(axes.read(grid), path, mode, objectives, cluster, device, engine, threads, timing, processes=cores())
    if mode == "measure":
        from .sweep_measure import measured

        summary = measured(plan, progress)
    else:
        with opened(path, None if objectives else sys.stdout) as writer:
            summary = estimated(plan, writer, progress)
    if path:
        progress.line(f"{path} holds {summary.written} points")
    for note in render_sweep.notes(summary):
        progress.line(note)
    if summary.front is not None:
        click.echo(render_sweep.as_form(summary.front, objectives, mode, form or "table"), nl=False)
    return INTERRUPTED if summary.interrupted else 0
