"""``effref audit``."""

from __future__ import annotations

from pathlib import Path

import click

from . import options
from .endings import exit_code
from .output import Target
from .progress import Progress


@click.command("audit", short_help="The papers' headline claims: closed form, measured here, verdict.")
@options.method_option("all that claims are kept about")
@click.option("--model", metavar="NAME|FOLDER", help="Measure this one instead of each claim's own.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Or closed forms only, in seconds.")
@options.engine_options
@options.gpu_options
@options.hardware_option
@click.option(
    "--max-seconds", type=options.Number(0, min_open=True), metavar="S", default=600.0, show_default=True,
    help="For all claims together; what is begun is finished.",
)  # fmt: skip
@options.seed_option
@options.output_options("table", "json", "md")
def command(
    method: list[str] | None, model: str | None, measure: bool, device: str | None, engine: str | None,
    threads: int | None, hardware: str | None, max_seconds: float, seed: int, form: str | None, path: Path | None,
    quiet: bool,
) -> int:  # fmt: skip
    """Put what papers claim beside what the cost model says and what is measured here, with a verdict.

    Verdicts are results: the exit code is 0 whatever they are. Fetch the small models first ('effref models fetch
    all'), because claims that depend on data are not judged on random weights.

    \b
    Examples:
      effref audit --no-measure
      effref audit --method svd-softmax,kvsharer
      effref audit --format json --output audit.json
    """
    from . import render
    from .auditing.render import blocks
    from .auditing.running import audited, planned

    target, progress = Target.of(form, path), Progress.on_stderr(quiet)
    plan = planned(method, model, measure, device, engine, threads, hardware, max_seconds, seed)
    document = audited(plan, progress)
    if target.needs_context:
        from .context import completed

        document = completed(document, plan.threads)
    target.write_blocks(lambda: blocks(document), progress, json=lambda: render.as_json(document))
    return exit_code(document)
