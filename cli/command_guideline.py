"""``effref guideline``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, render
from .output import Target
from .progress import Progress

FILE = click.Path(path_type=Path)


@click.command("guideline", short_help="The cheapest SVD-softmax head for a wished agreement on a text.")
@click.option("--agreement", type=float, default=0.99, show_default=True, metavar="A", help="Wished, 0 to 1.")
@click.option(
    "--top", type=options.POSITIVE, default=1, show_default=True, metavar="K", help="Of the likeliest K words."
)
@options.set_option
@options.model_option
@options.override_options
@options.dtype_option
@click.option("--input", "input_file", type=FILE, metavar="FILE", help="A .txt or .npy.  [one of effref's own]")
@click.option(
    "--calibration", "calibration_file", type=FILE, metavar="FILE", help="What the method looks at beforehand."
)
@click.option("--positions", type=options.POSITIVE, default=256, show_default=True, metavar="N", help="Of the text.")
@click.option("--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of random weights.")
@options.engine_options
@options.gpu_options
@options.hardware_option
@options.output_options("table", "json", "md")
def command(
    agreement: float, top: int, params: dict[str, dict[str, Any]], model: str | None, input_file: Path | None,
    calibration_file: Path | None, positions: int, seed: int, hardware: str | None, form: str | None,
    path: Path | None, quiet: bool, **given: Any,
) -> None:  # fmt: skip
    """Find window and candidates of svd-softmax that reach a wished agreement with the exact head, at the least cost.

    For each window the least candidates that reach it on the text, and what they cost at one position.

    \b
    Examples:
      effref guideline --model smollm2 --input text.txt --agreement 0.99
      effref guideline --model smollm2 --top 10 --agreement 0.95 --set svd-softmax.weighting=activations
    """
    from .guidance import METHOD, found, planned
    from .request import check_params

    target, progress = Target.of(form, path), Progress.on_stderr(quiet)
    check_params(params, (METHOD,))
    plan = planned(
        model, agreement, top, params.get(METHOD, {}), input_file, calibration_file, positions, seed,
        **options.request_options(given),
    )  # fmt: skip
    document = found(plan, hardware, progress)
    if target.needs_context:
        from .context import context

        document["context"] = context(plan.request.threads)
    target.write_blocks(lambda: render.guideline_blocks(document), progress, json=lambda: render.as_json(document))
