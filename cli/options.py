"""The options that several commands share, as decorators."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from refimpl.errors import ConfigError

from .parsing import parse_choices, parse_lengths, parse_names, parse_settings
from .request import DEFAULT_ENGINE, TF32, device_and_engine

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float16", "float32", "float64")
POSITIVE = click.IntRange(1)
OUTPUT = click.Path(path_type=Path)
OVERRIDES = {
    "layers": "the number of layers",
    "d_model": "the model width",
    "heads": "the query heads",
    "kv_heads": "the key and value heads",
    "d_ff": "the feed-forward width",
    "vocab": "the vocabulary",
}


class Number(click.FloatRange):
    """A number within a range. nan, which is neither below nor above anything, click would take for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is no number: give one, as 12.5.", param, ctx)
        return number


def parsed(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that parses an option where it was given."""
    return lambda _ctx, _parameter, given: None if given is None else parse(given)


def _group(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


dtype_option = click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of all arrays."
)

model_option = click.option(
    "--model", metavar="NAME|FOLDER|FILE", help="Name, checkpoint folder or config.json.  [the method's own]"
)

override_options = _group(
    *(
        click.option("--" + name.replace("_", "-"), name, type=POSITIVE, metavar="N", help=f"Override {what}.")
        for name, what in OVERRIDES.items()
    )
)

shape_options = _group(
    model_option,
    click.option(
        "--seq", callback=parsed(parse_lengths), metavar="LENGTHS", help="512,1024 or 2^9:2^13.  [256 to 2048]"
    ),
    click.option(
        "--kv-len",
        callback=parsed(parse_lengths),
        metavar="LENGTHS",
        help="Cached positions, in decoding.  [256,1024]",
    ),
    click.option("--batch", type=POSITIVE, metavar="B", default=1, show_default=True, help="Sequences at once."),
    click.option("--phase", metavar="NAME", default="prefill", show_default=True, help="prefill or decode."),
    click.option("--steps", type=POSITIVE, metavar="N", help="Tokens of a decoding pass.  [1]"),
    click.option("--causal/--no-causal", default=None, help="Override the model's own mask."),
    dtype_option,
    override_options,
)

set_option = click.option(
    "--set", "params", multiple=True, callback=parsed(parse_settings), metavar="NAME.KEY=VALUE",
    help="A parameter, as reuse.group=4; repeatable.",
)  # fmt: skip

baseline_option = click.option(
    "--baseline", type=click.Choice(("dense", "flash")), help="Show ratios to this one only.  [both]"
)


input_option = click.option(
    "--input",
    "input_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Run on .txt, .wav, .png, .jpg or .npy.  [seeded random]",
)


def method_option(usual: str) -> Callable[[F], F]:
    """--method, with what is taken where it is not given."""
    about = f"See 'effref list methods'.  [{usual}]"
    return click.option("--method", callback=parsed(parse_names), metavar="NAMES", help=about)


def choices_option(name: str, about: str) -> Callable[[F], F]:
    """An option that takes several values of a parameter."""
    parse = parsed(parse_choices(name))
    return click.option(name, multiple=True, callback=parse, metavar="NAME.KEY=V1,V2", help=about)


method_options = _group(
    method_option("dense,flash,reuse"),
    set_option,
    baseline_option,
)

_engine_options = _group(
    click.option("--device", type=click.Choice(("cpu", "gpu")), help="[cpu]"),
    click.option("--engine", metavar="NAME", help="numpy, numba or cupy.  [numba on the CPU, cupy on the GPU]"),
    click.option("--threads", type=POSITIVE, metavar="N", help="CPU threads.  [all cores]"),
    click.option("--tf32", is_flag=True, help="Round the factors of float32 products to TF32, on a GPU."),
)


def engine_options(command: F) -> F:
    """--device, --engine, --threads, and --tf32, which is short for an engine."""

    @functools.wraps(command)
    def chosen(*arguments: Any, device: str | None, engine: str | None, tf32: bool, **given: Any) -> Any:
        if tf32:
            if device_and_engine(device, engine)[1] not in (DEFAULT_ENGINE["gpu"], TF32):
                raise ConfigError("--tf32 is for products of the engine 'cupy': add --device gpu, or leave it away")
            engine = TF32
        return command(*arguments, device=device, engine=engine, **given)

    return cast(F, _engine_options(chosen))


_gpu_memory_option = click.option(
    "--gpu-memory", metavar="BYTES|PERCENT", help="Allocate no more on the GPU, as 8GiB or 40%.  [all that is free]"
)


def gpu_options(command: F) -> F:
    """--gpu-memory, for commands that run something: the limit of CuPy's pool is set before CuPy is loaded."""

    @functools.wraps(command)
    def limited(*arguments: Any, gpu_memory: str | None, **given: Any) -> Any:
        if gpu_memory is not None:
            from . import gpu

            if device_and_engine(given["device"], given["engine"])[0] != "gpu":
                raise ConfigError("--gpu-memory limits what is allocated on a GPU: add --device gpu, or leave it away")
            if given.get("cluster"):
                raise ConfigError(f"--gpu-memory is for this machine: set {gpu.LIMIT} where the workers are started")
            gpu.limit_memory(gpu_memory)
        return command(*arguments, **given)

    return cast(F, _gpu_memory_option(limited))


hardware_option = click.option(
    "--hardware", metavar="NAME|FILE|local", help="See 'effref list hardware'.  [local where calibrated]"
)

repeats_option = click.option("--repeats", type=POSITIVE, metavar="N", help="Passes, at most.  [5, in decoding 25]")
max_seconds_option = click.option(
    "--max-seconds", type=Number(0, min_open=True), metavar="S", default=40.0, show_default=True,
    help="For all passes together; compilation and calibration come on top.",
)  # fmt: skip
seed_option = click.option(
    "--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of weights and inputs."
)

warmup_option = click.option(
    "--warmup", type=click.IntRange(0), metavar="N", default=1, show_default=True, help="Before them."
)

timing_options = _group(repeats_option, warmup_option, max_seconds_option, seed_option)

passes_options = _group(
    click.option(
        "--l2",
        metavar="NAME",
        default="warm",
        show_default=True,
        help="warm or cold: overwrite the GPU's cache before each pass.",
    ),
    click.option("--graph", is_flag=True, help="Totals of recorded passes: CUDA graphs, or steps."),
    click.option(
        "--fuse", is_flag=True, help="In these, pairs of ops as one kernel: an add with its norm, and the like."
    ),
)

quiet_option = click.option("--quiet", is_flag=True, help="Nothing on stderr but errors.")


def output_options(*formats: str) -> Callable[[F], F]:
    """--format, --output and --quiet."""
    return _group(
        click.option(
            "--format", "form", type=click.Choice(formats), help="[table, or what the suffix of --output says]"
        ),
        click.option("--output", "path", type=OUTPUT, metavar="FILE", help="Write there, whole or not at all."),
        quiet_option,
    )


plot_option = click.option("--plot", type=OUTPUT, metavar="FILE", help="Also draw FILE.svg or FILE.png.")


def request_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a command as arguments of `request.resolve`; what was not given is left to its defaults."""
    sizes = {name: given.pop(name) for name in OVERRIDES}
    return {**{name: value for name, value in given.items() if value is not None}, "overrides": sizes}
