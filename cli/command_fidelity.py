"""``effref fidelity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, render, render_fidelity
from .endings import exit_code
from .output import Target
from .progress import Progress

FILE = click.Path(path_type=Path)


@click.command("fidelity", short_help="Error against exact attention on real weights and input, beside the cost.")
@options.method_option("reuse")
@options.choices_option("--over", "The knob of a curve and its values, as reuse.group=1,2,4.  [the method's own]")
@options.choices_option("--vary", "A curve for each of these values, as reuse.share=scores,probabilities.")
@options.set_option
@options.model_option
@options.override_options
@options.dtype_option
@click.option(
    "--input", "input_file", type=FILE, metavar="FILE", help="A .txt, .wav, .png, .jpg or .npy.  [one of effref's own]"
)
@click.option("--calibration", "calibration_file", type=FILE, metavar="FILE", help="What methods look at beforehand.")
@click.option("--seq", type=options.POSITIVE, metavar="T", help="Length.  [512 tokens of a text, else the input's own]")
@click.option("--windows", type=options.POSITIVE, metavar="K", help="Parts of a text, for language models.  [2]")
@click.option("--kv-len", type=options.POSITIVE, metavar="S", help="Cached positions before a decoding step.  [T]")
@click.option("--measure/--no-measure", default=None, help="Time the passes, too.  [yes, but not with engine numpy]")
@options.engine_options
@options.gpu_options
@options.hardware_option
@options.repeats_option
@options.max_seconds_option
@options.seed_option
@options.baseline_option
@options.output_options("table", "json", "csv", "md")
@options.plot_option
def command(
    baseline: str | None, hardware: str | None, form: str | None, path: Path | None, plot: Path | None, quiet: bool,
    input_file: Path | None, calibration_file: Path | None, seq: int | None, windows: int | None, kv_len: int | None,
    measure: bool | None, repeats: int | None, max_seconds: float, seed: int, over: Any, vary: Any, method: Any,
    params: Any, model: str | None, **given: Any,
) -> int:  # fmt: skip
    """Compare methods with exact attention on real weights and input, and put the cost beside the error.

    Every method is run over the values of its knob. For language models: KL divergence and agreement of the next token,
    and perplexity.

    \b
    Examples:
      effref fidelity --method reuse --model minilm
      effref fidelity --method reuse --model whisper --input speech.wav --over reuse.group=1,2,4 --plot reuse.svg
      effref fidelity --method kvsharer --model smollm2 --over kvsharer.layers=0,3,6,9
      effref fidelity --method kvsharer --vary kvsharer.order=dissimilar,similar,random --plot orders.png
    """
    from .comparison import METHODS, compared, planned
    from .material import Wanted
    from .measurement import DECODE_REPEATS, REPEATS, Timing

    target, progress = Target.of(form, path, plot), Progress.on_stderr(quiet)
    wanted = Wanted(input_file, calibration_file, seq, windows, seed)
    timing = Timing(repeats or REPEATS, 0, max_seconds, seed)
    plan = planned(
        model, method or METHODS, params, over, vary, wanted, kv_len, measure, timing, repeats or DECODE_REPEATS,
        **options.request_options(given),
    )  # fmt: skip
    document = compared(plan, hardware, progress)
    if target.needs_context:
        from .context import completed

        document = completed(document, plan.request.threads)
    target.write_blocks(
        lambda: render_fidelity.blocks(document, plan.request.baselines(baseline)),
        progress,
        json=lambda: render.as_json(document),
        csv=lambda: render_fidelity.as_csv(document),
    )
    if plot:
        from .plot_fidelity import draw

        draw(document, plot)
        progress.line(f"wrote {plot}")
    return exit_code(document)
