"""``effref maps``."""

from __future__ import annotations

from pathlib import Path

import click

from . import options, render
from .output import Target
from .progress import Progress


@click.command("maps")
@click.option("--model", metavar="NAME|FOLDER|FILE", default="conformer-m", show_default=True, help="Whose maps.")
@click.option(
    "--input", "input_file", type=click.Path(path_type=Path), metavar="FILE", help="A .txt, .wav, .png, .jpg or .npy."
)
@click.option(
    "--seq", type=options.POSITIVE, metavar="T", help="Length.  [the input's own; 256 for seeded random input]"
)
@click.option("--compute-layers", type=options.POSITIVE, metavar="N", help="Layers that keep their own map.  [half]")
@click.option(
    "--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of weights and inputs."
)
@options.output_options("table", "json", "md")
def command(
    model: str, input_file: Path | None, seq: int | None, compute_layers: int | None, seed: int, form: str | None,
    path: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Show how diagonal attention maps are, how alike from layer to layer, and which layers could share one.

    The suggested groups are what --set reuse.groups takes.

    \b
    Examples:
      effref maps --model minilm --input text.txt
      effref maps --model whisper --input speech.wav --compute-layers 2
    """
    from .diagnosis import diagnose

    target, progress = Target.of(form, path), Progress.on_stderr(quiet)
    found = diagnose(model, input_file, seq, compute_layers, seed, progress)
    target.write_blocks(lambda: render.maps_blocks(found), progress, json=lambda: render.as_json(found))
