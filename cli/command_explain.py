"""``effref explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, render
from .output import Target
from .progress import Progress


@click.command("explain", short_help="A method's equation and cost formulas.")
@click.option("--method", required=True, metavar="NAME", help="See 'effref list methods'.")
@options.set_option
@click.option("--model", metavar="NAME|FOLDER|FILE", help="Decides positions, key heads, biases and mask.")
@click.option("--causal/--no-causal", default=None, help="Override the model's own mask.")
@options.output_options("table", "json", "md")
def command(
    method: str, params: dict[str, dict[str, Any]], model: str | None, causal: bool | None, form: str | None,
    path: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Print a method's equation, parameters, source and cost formulas in symbols.

    \b
    Examples:
      effref explain --method reuse
      effref explain --method flash --model gpt2 --format md
      effref explain --method reuse+svd-softmax
    """
    from .explanation import explain
    from .request import check_params, params_of

    target = Target.of(form, path)
    check_params(params, (method,))
    found = explain(method, model, params_of(method, params), causal)
    json = lambda: render.as_json(found.as_dict())  # noqa: E731
    target.write_blocks(lambda: render.explain_blocks(found), Progress.on_stderr(quiet), json=json)
