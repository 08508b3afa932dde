"""``effref memo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, render
from .groups import Commands
from .layout import Block, Table
from .output import Target
from .progress import Progress

FOLDER = click.argument("folder", type=click.Path(path_type=Path))
FILES = click.option(
    "--input", "files", type=click.Path(path_type=Path), multiple=True, metavar="FILE", help="A .txt; may be repeated."
)


@click.group("memo", cls=Commands, short_help="Databases of attention maps for attmemo.")
def command() -> None:
    """Databases of attention maps: build one from texts, inspect it, profile it on text that was held out.

    \b
    Examples:
      effref memo build maps --model minilm-l6 --seq 128
      effref memo inspect maps
      effref memo profile maps
      effref measure --method attmemo --model minilm-l6 --seq 128 --set attmemo.database=maps
    """


@command.command("build")
@FOLDER
@click.option("--model", default="minilm-l6", show_default=True, metavar="NAME|FOLDER", help="Whose maps.")
@FILES
@click.option("--seq", type=options.POSITIVE, default=128, show_default=True, metavar="T", help="Tokens of a window.")
@click.option("--sequences", type=options.POSITIVE, metavar="N", help="Windows to keep, at most.  [all]")
@click.option(
    "--held-out", type=options.Number(0, 0.9), default=0.2, show_default=True, metavar="PART",
    help="The last part of each text is not kept, but left for 'profile'.",
)  # fmt: skip
@click.option("--epochs", type=click.IntRange(0), default=40, show_default=True, metavar="N", help="Of training.")
@click.option("--batch", type=click.IntRange(2), default=32, show_default=True, metavar="N", help="Of training.")
@click.option("--heads", type=click.Choice(("all", "first")), default="all", show_default=True, help="Compared ones.")
@click.option("--index", type=click.Choice(("flat", "hnsw")), default="flat", show_default=True, help="Keep a graph.")
@options.dtype_option
@click.option("--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of the training.")
@options.output_options("table", "json", "md")
def build(
    folder: Path, model: str, files: tuple[Path, ...], seq: int, sequences: int | None, held_out: float, epochs: int,
    batch: int, heads: str, index: str, dtype: str, seed: int, form: str | None, path: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Keep the maps of a model on texts in FOLDER, and train the embedding that finds them.

    What was begun goes on where it was stopped. Without --input the texts that come along are used.

    \b
    Example:
      effref memo build maps --model minilm-l6 --seq 128 --input book.txt
    """
    from refimpl.memo.building import Plan
    from refimpl.memo.training import Settings

    from .memo import Source, build_database

    target, progress = Target.of(form, path), Progress.on_stderr(quiet)
    plan = Plan(Settings(epochs, batch, seed=seed), heads, index=index)
    found = build_database(folder, model, Source(files, seq, sequences, held_out), plan, 0, dtype, progress)
    _write(target, progress, found, lambda: _description(found))


@command.command("inspect")
@FOLDER
@options.output_options("table", "json", "md")
def inspect(folder: Path, form: str | None, path: Path | None, quiet: bool) -> None:
    """Print what a database holds, after comparing all bytes with their checksums.

    \b
    Example:
      effref memo inspect maps
    """
    from .memo import inspect_database

    target, progress = Target.of(form, path), Progress.on_stderr(quiet)
    progress.stage("checking all bytes")
    found = inspect_database(folder)
    _write(target, progress, found, lambda: _description(found))


@command.command("profile")
@FOLDER
@FILES
@click.option("--taus", metavar="LIST", default="0.95,0.9,0.8,0.7,0", show_default=True, help="Thresholds.")
@click.option("--tau", type=options.Number(0, 1), default=0.9, show_default=True, help="At which layers are selected.")
@click.option("--batch", type=options.POSITIVE, default=8, show_default=True, metavar="B", help="Sequences of a pass.")
@click.option("--repeats", type=options.POSITIVE, default=3, show_default=True, metavar="N", help="Rounds.")
@click.option("--transfer", type=click.Choice(("copy", "map")), default="copy", show_default=True, help="Of maps.")
@options.hardware_option
@click.option("--dry", is_flag=True, help="Do not note it in the database.")
@options.output_options("table", "json", "md")
def profile(
    folder: Path, files: tuple[Path, ...], taus: str, tau: float, batch: int, repeats: int, transfer: str,
    hardware: str | None, dry: bool, form: str | None, path: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Measure hit rate, latency and error on text that was held out, and note which layers pay.

    \b
    Example:
      effref memo profile maps --taus 0.95,0.9,0.8 --batch 8
    """
    from .memo import profile_database, thresholds

    target, progress = Target.of(form, path), Progress.on_stderr(quiet)
    found = profile_database(
        folder, thresholds(taus), batch, repeats, transfer, tau, not dry, hardware, files, progress
    )  # fmt: skip
    _write(target, progress, found, lambda: _profile(found))


def _write(target: Target, progress: Progress, found: dict[str, Any], blocks: Any) -> None:
    target.write_blocks(blocks, progress, json=lambda: render.as_json(found))


def _description(found: dict[str, Any]) -> list[Block]:
    shown = {name: value for name, value in found.items() if name not in ("profile", "loss", "weights")}
    cells = [[name, _word(value)] for name, value in shown.items()]
    cells += [[name, render.small(value)] for name, value in found["loss"].items()]
    return [Table("database of attention maps", ["what", "value"], cells, left=2)]


def _profile(found: dict[str, Any]) -> list[Block]:
    number, part = render.number, _percent
    counts = f"{found['records']} records, {found['held_out']} held out"
    head = f"{found['model']}, T={found['length']}, batch {found['batch']}, {counts}"
    rows = [
        [
            f"{row['tau']:g}", part(row["hit_rate"]), number(1e3 * row["seconds_per_batch"]),
            number(row["speedup_dense"]), number(row["speedup_flash"]), number(row["predicted_speedup_dense"]),
            str(len(row["selected"])), number(row["selected_speedup_dense"]),
            render.small(row["rel_l2"]), render.cosine(row["cosine"]),
        ]
        for row in found["thresholds"]
    ]  # fmt: skip
    headers = [
        "tau", "hits %", "batch ms", "x dense", "x flash", "x dense, pred.", "layers that pay", "x dense in those",
        "rel. L2", "cosine",
    ]  # fmt: skip
    shares = ("reduction", "predicted_reduction", "predicted_ceiling", "pass_reduction")
    attention = [
        [
            row["transfer"], *(number(1e3 * row[name]) for name in ("dense_s", "attmemo_s", "fetch_s")),
            *(part(row[name]) for name in shares),
        ]
        for row in found["all_hit"]
    ]  # fmt: skip
    layers = [
        [
            str(row["layer"]), part(row["hit_rate"]), number(1e3 * row["dense_s"]), number(1e3 * row["attention_s"]),
            number(1e3 * row["memo_s"]), _signed(row["benefit_s"]), _signed(row["predicted_benefit_s"]),
        ]
        for row in found["layers"]
    ]  # fmt: skip
    about = ["layer", "hits %", "dense ms", "attmemo ms", "of which memo", "benefit ms", "benefit ms, pred."]
    return [
        Table(head, headers, rows, left=0),
        Table(
            "attention where all hit: how much shorter than dense; the ceiling is the prediction without look-ups",
            [
                "maps",
                "dense ms",
                "attmemo ms",
                "of which fetch",
                "less %",
                "less %, pred.",
                "ceiling %, pred.",
                "whole pass, less %",
            ],
            attention,
            left=1,
        ),
        Table(f"attention by layer, of a batch, at tau={found['tau']:g}", about, layers, left=0),
    ]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(seconds: float) -> str:
    return f"{1e3 * seconds:+.3f}"
