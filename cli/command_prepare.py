"""``effref prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import files, options, render
from .output import Target
from .progress import Progress

FILE = click.Path(path_type=Path)


@click.command("prepare", short_help="Find what a method needs first.")
@click.option("--method", required=True, metavar="NAME", help="One that searches or matches first, as kvsharer.")
@options.set_option
@options.model_option
@options.override_options
@click.option(
    "--input", "input_file", required=True, type=FILE, metavar="FILE", help="A .txt, .wav, .png, .jpg or .npy."
)
@click.option("--seq", type=options.POSITIVE, metavar="T", help="Positions of the input that are used.  [all]")
@options.dtype_option
@click.option("--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of random weights.")
@options.engine_options
@options.gpu_options
@click.option("--format", "form", type=click.Choice(("table", "json", "md")), help="[table]")
@click.option("--output", "path", type=options.OUTPUT, metavar="FILE", help="Also write what is found, as JSON.")
@options.quiet_option
def command(
    method: str, params: dict[str, dict[str, Any]], model: str | None, input_file: Path, seq: int | None, dtype: str,
    seed: int, device: str | None, engine: str | None, threads: int | None, form: str | None, path: Path | None,
    quiet: bool, **sizes: int | None,
) -> None:  # fmt: skip
    """Find what a method needs before it runs, as which layers share, and print and write it.

    The file of --output is what the method's parameter takes: --set kvsharer.strategy=FILE. What was found is kept, so
    that the same request answers at once.

    \b
    Examples:
      effref prepare --method kvsharer --input text.txt --output strategy.json
      effref prepare --method kvsharer --model smollm2-135m --set kvsharer.layers=8 --input text.txt
    """
    from .preparation import found, request_for
    from .request import check_params

    target, progress = Target.of(form, None), Progress.on_stderr(quiet)
    if path:
        files.check_target(path)
    check_params(params, (method,))
    request = request_for(
        model, method, params.get(method), overrides=sizes, dtype=dtype, device=device, engine=engine, threads=threads
    )
    document = found(request, input_file, seq, seed, progress)
    json = render.as_json(document)
    if path:
        files.write_text(path, json)
        progress.line(f"wrote {path}")
    target.write_blocks(lambda: render.document_blocks(document), progress, json=lambda: json)
