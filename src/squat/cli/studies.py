"""The commands that look into models: compare, sensitivity, attention, report."""

from __future__ import annotations

import shlex
import sys
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

from squat.cli import results
from squat.cli.results import Json
from squat.terminal import show

studies = typer.Typer()

Models = Annotated[list[str], typer.Argument(help="Folders, Hub names or .gguf files.")]
Text = Annotated[Path, typer.Option(help="Text: a folder or a file.")]
BySource = Annotated[bool, typer.Option(help="Clean BabyLM's files by source.")]
Length = Annotated[int, typer.Option(help="Tokens per window.", min=2)]


def typed() -> str:
    """What the user typed, for whoever reads the result."""
    return shlex.join(["squat", *sys.argv[1:]])


@studies.command()
def compare(
    models: Models,
    data: Annotated[
        Path | None, typer.Option(help="Text for loss, perplexity, KL to the first, and speed.")
    ] = None,
    pairs: Annotated[
        list[Path] | None, typer.Option(help="Folders of minimal pairs (BLiMP); repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs per paradigm.", min=1)] = None,
    tokens: Annotated[int | None, typer.Option(help="How much of the text.", min=2)] = None,
    sequence_length: Length = 128,
    by_source: BySource = True,
    speed: Annotated[bool, typer.Option(help="Take the time, too.")] = True,
    json: Json = None,
    csv: Annotated[Path | None, typer.Option(help="Write a table for spreadsheets here.")] = None,
    output: Annotated[Path | None, typer.Option(help="Leave a section for squat report.")] = None,
) -> None:
    """Put models side by side: size, speed, perplexity, KL divergence, minimal pairs."""
    from squat.report.studies import comparison_study

    table, numbers = comparison_study(
        models, data, pairs or [], limit, tokens, sequence_length, by_source, speed,
        csv=csv, output=output, command=typed(),
    )  # fmt: skip
    results.report(table.to_rich(), numbers, json)


@studies.command()
def sensitivity(
    model: Annotated[
        str, typer.Argument(help="The full-precision model: a folder, Hub name or .gguf file.")
    ],
    data: Text,
    output: Annotated[Path, typer.Option(help="Folder of the table, the figure, the numbers.")],
    weight_bits: Annotated[int, typer.Option(help="2 to 8.")] = 4,
    activation_bits: Annotated[int, typer.Option(help="2 to 8.")] = 4,
    method: Annotated[str, typer.Option(help="The quantizer.")] = "lsq",
    init: Annotated[str, typer.Option(help="How step sizes are found: mse or lsq.")] = "mse",
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; default: its own.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How much of the text.", min=2)] = 8192,
    sequence_length: Length = 128,
    by_source: BySource = True,
    json: Json = None,
) -> None:
    """Quantize each part of a model alone, without training: which one hurts? (Figure 1)"""
    from squat.quantization import SquatConfig
    from squat.report.studies import sensitivity_study

    config = SquatConfig(
        weight_bits=weight_bits, activation_bits=activation_bits, method=method, init=init
    )
    section = sensitivity_study(
        model, data, output, config, calibration, tokens, sequence_length, by_source, typed()
    )
    _show(section, output, json)


@studies.command()
def attention(
    models: Annotated[
        list[str], typer.Argument(help="Folders or Hub names, the full-precision one first.")
    ],
    data: Text,
    output: Annotated[Path, typer.Option(help="Folder of the figures and the numbers.")],
    text: Annotated[str, typer.Option(help="Whose tokens' widths are drawn.")] = (
        "The children who live near the old harbour had never seen a boat as large as this one. They ran "
        "down to the water and called to the sailors, who waved back and threw them oranges."
    ),
    layer: Annotated[
        int | None, typer.Option(help="Whose q and k are drawn.  [default: the last]")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of the text.", min=1)] = 16,
    sequence_length: Length = 64,
    by_source: BySource = True,
    json: Json = None,
) -> None:
    """Draw q and k, attention maps, and which tokens get 8 bits, model by model (Figures 2, 3)."""
    from squat.report.studies import attention_study

    section = attention_study(
        models, data, text, output, layer, windows, sequence_length, by_source, typed()
    )
    _show(section, output, json)


@studies.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="A run of squat train or squat sweep, or what studies left.")
    ],
    include: Annotated[
        list[Path] | None, typer.Option(help="More folders with results; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file to write.  [default: RUN/report.html]")
    ] = None,
    json: Json = None,
) -> None:
    """One HTML file of everything that is known about a run or a model; it needs no network."""
    from squat.report.page import write_report

    file = write_report(run, include or [], output or run / "report.html")
    size = file.stat().st_size
    results.report(f"{file}: {size / 1e6:.2f} MB", {"file": str(file), "bytes": size}, json)


def _show(section: Any, output: Path, json: Path | None) -> None:
    with results.only_json(json):
        for table in section.tables:
            show(table.to_rich())
    figures = "\n".join(f"{output / name}: {text}" for text, name in section.figures.items())
    results.report(figures, loads((output / "numbers.json").read_text()), json)
