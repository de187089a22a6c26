"""The command line: it parses, calls and prints; what it calls lives elsewhere.

Every mistake of the user ends in one line on standard error and exit status 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from squat.errors import SquatError

app = typer.Typer(
    help="Quantize small language models to 4 bits, keep what they know, run them on a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Recipe = Annotated[Path, typer.Argument(help="A YAML file; see the folder recipes/.")]
Model = Annotated[str, typer.Argument(help="A model's folder or Hub name, or a .gguf file.")]


def main() -> None:
    """Entry point of `squat`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except SquatError as error:
        typer.secho(f"squat: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of everything it makes.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train, quantize, evaluate and generate, on built-in text, in a few minutes."""
    from squat.demo import run_demo

    run_demo(output, console)


@app.command()
def pretrain(recipe: Recipe) -> None:
    """Train a full-precision model from scratch. Run it again to resume."""
    from squat.recipes import PretrainRecipe, read_recipe
    from squat.runs import pretrain as run

    console.print(f"model: {run(read_recipe(recipe, PretrainRecipe))}")


@app.command()
def train(recipe: Recipe) -> None:
    """Quantization-aware training of an existing model. Run it again to resume."""
    from squat.recipes import TrainRecipe, read_recipe
    from squat.runs import train as run

    console.print(f"model: {run(read_recipe(recipe, TrainRecipe))}")


@app.command()
def sweep(
    folder: Annotated[Path, typer.Argument(help="A folder with a sweep.yaml; see recipes/.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Do this run only, by its name (repeatable).")
    ] = None,
) -> None:
    """Train and measure the runs of a folder, one after another; one table. Run it again to resume."""
    from squat.sweeps import run_sweep

    rows = run_sweep(folder, console, only or ())
    if any(row.problem for row in rows):
        raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="The full-precision model's folder or Hub name.")],
    output: Annotated[Path, typer.Argument(help="Folder of the quantized model.")],
    weight_bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
    activation_bits: Annotated[str, typer.Option(help="4, 8, or 4:8 by token.")] = "4:8",
    init: Annotated[str, typer.Option(help="How step sizes are found: mse or lsq.")] = "mse",
    data: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; default: its own.")
    ] = None,
    by_source: Annotated[bool, typer.Option(help="Clean BabyLM's files by source.")] = True,
) -> None:
    """Quantize without training (PTQ): seconds, and worse than squat train at 4 bits."""
    from squat.quantize import SquatConfig
    from squat.runs import quantize_without_training

    bits: Any = int(activation_bits) if activation_bits.isdigit() else activation_bits
    config = SquatConfig(weight_bits=weight_bits, activation_bits=bits, init=init)
    quantize_without_training(model, config, output, data, by_source)
    console.print(f"model: {output}")


@app.command(name="eval")
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="blimp, perplexity or glue.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="blimp: folders of .jsonl pairs (repeatable); perplexity: a text folder; "
            "glue: the folder of <task>.train.jsonl and <task>.valid.jsonl."
        ),
    ],
    json: Annotated[Path | None, typer.Option(help="Write the result here; - for stdout.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="blimp: pairs per paradigm; glue: examples per file.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences scored at once.", min=1)] = 64,
    sequence_length: Annotated[
        int, typer.Option(help="perplexity: tokens per window; glue: the most per input.")
    ] = 128,
    by_source: Annotated[
        bool, typer.Option(help="perplexity: clean BabyLM's files by source.")
    ] = True,
    tasks: Annotated[
        str | None, typer.Option(help="glue: some of the tasks, as in cola,mrpc.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="glue: runs per task.", min=1)] = 3,
    epochs: Annotated[int, typer.Option(help="glue: of fine-tuning.", min=1)] = 3,
    learning_rate: Annotated[float, typer.Option(help="glue: of fine-tuning.", min=0)] = 1e-4,
    train_batch_size: Annotated[
        int, typer.Option(help="glue: examples per training step.", min=1)
    ] = 32,
    output: Annotated[
        Path, typer.Option(help="glue: folder of results; models in one folder share a table.")
    ] = Path("runs/glue"),
) -> None:
    """Measure a model: minimal pairs (BLiMP), perplexity, or fine-tuning on (Super)GLUE.

    glue fine-tunes once per task and seed; run again, it goes on where it stopped.
    """
    from squat.evaluate.tasks import FineTuningSettings, run_task

    settings = FineTuningSettings(
        data,
        limit,
        batch_size,
        sequence_length,
        by_source,
        output,
        tasks,
        seeds,
        epochs,
        learning_rate,
        train_batch_size,
    )
    table, result = run_task(task, model, settings)
    text = _json(result)
    if json is None:
        console.print(table)
    elif str(json) == "-":
        print(text)
    else:
        from squat.data.files import writing

        console.print(table)
        with writing(json) as out:
            out.write(text.encode())


@app.command()
def generate(
    model: Model,
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: int = 0,
) -> None:
    """Continue a text."""
    from squat.generation import continue_text

    for piece in continue_text(model, prompt, max_new_tokens, temperature, top_p, seed):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A quantized model's folder.")],
    out: Annotated[Path, typer.Argument(help="The .gguf file to write.")],
) -> None:
    """Write a trained model's integer codes to one .gguf file, for the engine and for llama.cpp."""
    from squat.checkpoints import load_model, load_tokenizer
    from squat.deploy.export import export as write
    from squat.deploy.export import tokenizer_json

    tokenizer = tokenizer_json(load_tokenizer(checkpoint))
    write(load_model(checkpoint), tokenizer, Path(checkpoint).resolve().name, out)
    console.print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


@app.command()
def parity(
    checkpoint: Annotated[str, typer.Argument(help="A quantized model's folder.")],
    file: Annotated[str, typer.Argument(help="The .gguf file exported from it.")],
    data: Annotated[Path, typer.Option(help="Text to compare on: a folder or a file.")],
    tokens: Annotated[int, typer.Option(help="How much of it.", min=2)] = 4096,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 128,
    by_source: Annotated[bool, typer.Option(help="Clean BabyLM's files by source.")] = True,
) -> None:
    """Compare a checkpoint with its file: codes, and logits of PyTorch and of the engine."""
    from squat.checkpoints import load_model, load_tokenizer
    from squat.data import tokenize_corpus
    from squat.deploy.export import tokenizer_json
    from squat.deploy.parity import compare, parity_table

    tokenizer = load_tokenizer(checkpoint)
    ids = tokenize_corpus(data, tokenizer, by_source=by_source)[:tokens].tolist()
    windows = [ids[i : i + sequence_length] for i in range(0, len(ids), sequence_length)]
    found = compare(load_model(checkpoint), tokenizer_json(tokenizer), file, windows)
    console.print(parity_table(found))
    if not found.holds:
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """What this installation and this machine can do."""
    from squat.info import info_table

    console.print(info_table())


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=2)
