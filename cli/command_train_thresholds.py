"""``effref train-thresholds``."""

from __future__ import annotations

from pathlib import Path

import click

from . import files, options, render
from .output import Target
from .progress import Progress

FILE = click.Path(path_type=Path)


@click.command("train-thresholds", short_help="Train the thresholds of latte, head by head.")
@click.option("--model", metavar="NAME|FOLDER|FILE", default="smollm2-135m", show_default=True, help="As elsewhere.")
@options.override_options
@click.option(
    "--input", "input_files", multiple=True, required=True, type=FILE, metavar="FILE",
    help="A .txt or .npy; repeatable. The last quarter of each one's windows is held out.",
)  # fmt: skip
@click.option(
    "--seq", type=options.POSITIVE, metavar="T", default=256, show_default=True, help="Positions of a window."
)
@click.option("--target-kept", type=float, default=0.15, show_default=True, metavar="SHARE", help="Of visible pairs.")
@click.option("--steps", type=options.POSITIVE, metavar="N", default=100, show_default=True, help="Steps, in all.")
@click.option("--batch", type=options.POSITIVE, metavar="B", default=1, show_default=True, help="Windows a step.")
@click.option("--lr", "rate", type=float, default=0.2, show_default=True, metavar="X", help="Step size of Adam.")
@click.option(
    "--lambda", "weight", type=float, default=1000.0, show_default=True, metavar="X",
    help="Weight of (kept - target)^2 in the loss.",
)  # fmt: skip
@click.option("--temperature", type=float, default=1.0, show_default=True, metavar="X", help="Of the soft mask.")
@click.option("--estimate", metavar="NAME", default="ms4b", show_default=True, help="ms4b or exact.")
@click.option("--nibble", metavar="NAME", default="floor", show_default=True, help="floor or round.")
@click.option("--stage2", metavar="NAME", default="int8", show_default=True, help="int8 or float: scores of kept keys.")
@click.option("--start", metavar="NAME", default="quantile", show_default=True, help="quantile or global.")
@click.option("--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of order and weights.")
@click.option("--threads", type=options.POSITIVE, metavar="N", help="CPU threads.  [all cores]")
@click.option("--checkpoint", type=options.OUTPUT, metavar="FILE", help="Kept after every step; gone on from.")
@click.option("--compare", is_flag=True, help="Also judge untrained thresholds that keep as much.")
@click.option("--format", "form", type=click.Choice(("table", "json", "md")), help="[table]")
@click.option("--output", "path", type=options.OUTPUT, metavar="FILE", help="Also write the thresholds, as JSON.")
@options.quiet_option
def command(
    model: str, input_files: tuple[Path, ...], seq: int, target_kept: float, steps: int, batch: int, rate: float,
    weight: float, temperature: float, estimate: str, nibble: str, stage2: str, start: str, seed: int,
    threads: int | None, checkpoint: Path | None, compare: bool, form: str | None, path: Path | None, quiet: bool,
    **sizes: int | None,
) -> None:  # fmt: skip
    """Train how far below the best key of its row a key may lie to be kept, head by head, and judge it.

    The model's weights stay as they are. The recipe is ours; the paper's is not known. An interrupted training goes on
    from its checkpoint. The file of --output is what latte reads.

    \b
    Examples:
      effref train-thresholds --input text.txt --target-kept 0.15 --output thresholds.json
      effref train-thresholds --model minilm --input text.txt --seq 128 --steps 50 --compare
    """
    from refimpl.training.filter import Rule
    from refimpl.training.thresholds import Recipe

    from .threshold_training import Asked, found

    target, progress = Target.of(form, None), Progress.on_stderr(quiet)
    for file in (path, checkpoint):
        if file:
            files.check_target(file)
    rule = Rule(estimate, nibble, stage2, temperature)  # type: ignore[arg-type]  # checked there
    recipe = Recipe(target_kept, weight, rate, batch, seed, start, rule)  # type: ignore[arg-type]
    asked = Asked(model, sizes, input_files, seq, recipe, steps, threads, checkpoint, compare)
    document = found(asked, progress)
    json = render.as_json(document)
    if path:
        files.write_text(path, json)
        progress.line(f"wrote {path}")
    target.write_blocks(lambda: render.thresholds_blocks(document), progress, json=lambda: json)
