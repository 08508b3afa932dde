"""The options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .parsing import parse_lengths, parse_names, parse_settings
from .render import FORMATS

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float16", "float32", "float64")
OVERRIDES = ("layers", "d_model", "heads", "kv_heads", "d_ff", "vocab")


def _parsed(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    return lambda _ctx, _parameter, given: None if given is None else parse(given)


def _group(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


shape_options = _group(
    click.option("--model", metavar="NAME|FOLDER|FILE", help="Model by name, checkpoint folder or config.json."),
    click.option("--seq", callback=_parsed(parse_lengths), metavar="LENGTHS", help="512,1024 or 2^9:2^13.  [256 to 2048]"),
    click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once."),
    click.option("--phase", default="prefill", show_default=True, help="What a pass does."),
    click.option("--causal/--no-causal", default=None, help="Override the model's own mask."),
    click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of weights and activations."),
    *(
        click.option("--" + name.replace("_", "-"), name, type=click.IntRange(1), help="Override the model's size.")
        for name in OVERRIDES
    ),
)

method_options = _group(
    click.option("--method", callback=_parsed(parse_names), metavar="NAMES", help="See 'effref list methods'.  [dense,flash,reuse]"),
    click.option("--set", "params", multiple=True, callback=_parsed(parse_settings), metavar="M.KEY=VALUE", help="A parameter, as reuse.group=4; repeatable."),
    click.option("--baseline", type=click.Choice(("dense", "flash")), help="Show the ratio to this one only.  [both]"),
)

engine_options = _group(
    click.option("--device", type=click.Choice(("cpu", "gpu")), help="[cpu]"),
    click.option("--engine", metavar="NAME", help="numpy, numba or cupy.  [numba on the CPU, cupy on the GPU]"),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [all cores]"),
)

hardware_option = click.option("--hardware", metavar="NAME|FILE|local", help="See 'effref list hardware'.  [local if calibrated]")

quiet_option = click.option("--quiet", is_flag=True, help="Nothing on stderr but errors.")


output_options = _group(
    click.option("--format", "form", type=click.Choice(FORMATS), help="[table, or what the suffix of --output says]"),
    click.option("--output", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write there, whole or not at all."),
    quiet_option,
)

plot_option = click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Also draw FILE.svg or FILE.png.")


def request_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a command as arguments of `request.resolve`; what was not given is left to its defaults."""
    sizes = {name: given.pop(name) for name in OVERRIDES}
    return {**{name: value for name, value in given.items() if value is not None}, "overrides": sizes}
