"""The command line: it parses, calls and prints; what it calls lives elsewhere.

Every mistake of the user ends in one line on standard error and exit status 2; training that left the finite
numbers, a check that found a difference and a sweep with a run that failed in status 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from squat.cli.results import Json, only_json, report
from squat.cli.studies import studies, typed
from squat.errors import DivergedError, ParityError, SquatError, UnfinishedError
from squat.extras import what_to_install
from squat.terminal import console, two_columns, write_what_cannot_be_encoded

EXIT_STATUS = (
    "Exit status: 0 done; 1 something does not hold (parity), a run failed, or training left the finite "
    "numbers; 2 bad input; 3 time was up (--max-minutes), the same command goes on; 130 Ctrl-C."
)

app = typer.Typer(
    help="Quantize small language models to 4 bits, keep what they know, run them on a CPU.",
    epilog=EXIT_STATUS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(studies)

UNFINISHED = 3
"""Exit status of a training whose time was up: the same command goes on."""

Recipe = Annotated[Path, typer.Argument(help="A YAML file; see the folder recipes/.")]
MaxMinutes = Annotated[
    float | None,
    typer.Option(help="Save a checkpoint and stop after so long, with exit status 3.", min=0),
]
Model = Annotated[str, typer.Argument(help="A model's folder or Hub name, or a .gguf file.")]
File = Annotated[str, typer.Argument(help="A .gguf file that squat export wrote.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", min=0)]
TopP = Annotated[float, typer.Option(min=0, max=1)]
Speculate = Annotated[
    int,
    typer.Option(
        help="The most tokens guessed from the text itself, up to 32; it is the same, and sooner there if it "
        "repeats much. Of a .gguf file.",
    ),
]
Forget = Annotated[
    bool,
    typer.Option(
        "--forget",
        help="Where the context is full, read no more of the oldest messages; system ones are kept.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from squat import __version__

        print(f"squat {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """What stands in front of every command."""


def main() -> None:
    """Entry point of `squat`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    write_what_cannot_be_encoded()
    try:
        app()
    except UnfinishedError as stop:
        typer.echo(f"squat: {stop}", err=True)
        sys.exit(UNFINISHED)
    except SquatError as error:
        typer.secho(f"squat: {error}", fg="red", err=True)
        sys.exit(1 if isinstance(error, (DivergedError, ParityError)) else 2)
    except ModuleNotFoundError as error:
        if (missing := what_to_install(error)) is None:
            raise
        typer.secho(f"squat: {missing}", fg="red", err=True)
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
def pretrain(recipe: Recipe, max_minutes: MaxMinutes = None, json: Json = None) -> None:
    """Train a full-precision model from scratch. Run it again to resume."""
    from squat.recipes import PretrainRecipe, read_recipe
    from squat.runs import pretrain as run

    with only_json(json):
        model = run(read_recipe(recipe, PretrainRecipe), max_minutes)
    _report_training(model, json)


@app.command()
def train(recipe: Recipe, max_minutes: MaxMinutes = None, json: Json = None) -> None:
    """Quantization-aware training of an existing model. Run it again to resume."""
    from squat.recipes import TrainRecipe, read_recipe
    from squat.runs import train as run

    with only_json(json):
        model = run(read_recipe(recipe, TrainRecipe), max_minutes)
    _report_training(model, json)


def _report_training(model: Path, json: Path | None) -> None:
    """Where the model is, and what the run's log ends with; of several processes the first one tells."""
    from json import loads

    from squat.replicas import is_first

    if not is_first():
        return
    log = loads((model.parent / "log.json").read_text())
    result = {"model": str(model), "seconds": log["seconds"], "last": (log["log"] or [None])[-1]}
    report(f"model: {model}", result, json)


@app.command()
def tokenize(
    text: Annotated[Path, typer.Argument(help="A folder of text files, or one file.")],
    tokenizer: Annotated[str, typer.Argument(help="A model, or a tokenizer.json.")],
    out: Annotated[Path, typer.Argument(help="Without a suffix: it will be .uint16 or .uint32.")],
    by_source: Annotated[bool, typer.Option(help="Clean BabyLM's files by source.")] = True,
    json: Json = None,
) -> None:
    """Write a text's token ids to a file, to train with as data.train on a machine without the text."""
    from squat.checkpoints import load_tokenizer
    from squat.data import tokenize_corpus
    from squat.data.files import check_no_folder, writing

    check_no_folder(out)
    tokens = tokenize_corpus(text, load_tokenizer(tokenizer), by_source=by_source)
    file = out.parent / f"{out.name}.{tokens.dtype.name}"
    with writing(file) as stream:
        tokens.tofile(stream)
    report(
        f"{file}: {tokens.size:,} tokens, {tokens.nbytes / 1e6:.1f} MB",
        {"file": str(file), "tokens": tokens.size, "bytes": tokens.nbytes},
        json,
    )


@app.command()
def sweep(
    folder: Annotated[Path, typer.Argument(help="A folder with a sweep.yaml; see recipes/.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Do this run only, by its name (repeatable).")
    ] = None,
    max_minutes: MaxMinutes = None,
    json: Json = None,
) -> None:
    """Train and measure the runs of a folder, one after another; one table. Run it again to resume."""
    from squat.report.sweep import plain
    from squat.sweeps import run_sweep

    with only_json(json):
        rows = run_sweep(folder, console, only or (), max_minutes)
    if json is not None:
        report(str(json), plain(rows), json)
    if any(row.problem for row in rows):
        raise typer.Exit(1)


@app.command(name="import")
def import_(
    file: Annotated[str, typer.Argument(help="A .gguf file that another program wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder of the model.")],
    json: Json = None,
) -> None:
    """Make a float32 model's folder of a .gguf file, also one that is quantized in blocks."""
    from squat.importing.folder import import_model

    found = import_model(file, output)
    report(two_columns(found), found, json)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="The full-precision model: a folder, Hub name or .gguf file.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder of the quantized model.")],
    weight_bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
    activation_bits: Annotated[str, typer.Option(help="4, 8, or 4:8 by token.")] = "8",
    embedding_bits: Annotated[int, typer.Option(help="4 or 8, of embeddings and head.")] = 8,
    cache_bits: Annotated[
        int | None,
        typer.Option(help="4 or 8, of keys and values.  [default: those of the activations]"),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="descent: each matrix as a whole; nearest: each weight by itself.")
    ] = "descent",
    weight_steps: Annotated[
        str, typer.Option(help="row: a step for each output; tensor: one, as in the paper.")
    ] = "row",
    token_steps: Annotated[
        str,
        typer.Option(
            help="peak: tokens' steps follow their largest magnitudes; exponent: tokens raise them by powers "
            "of two; static: the same for all."
        ),
    ] = "peak",
    softmax: Annotated[
        str,
        typer.Option(
            help="base2: probabilities become codes at once; natural: by a step, as in the paper."
        ),
    ] = "base2",
    weight_levels: Annotated[
        str, typer.Option(help="What 4-bit weights stand for: iq4_nl or uniform.")
    ] = "iq4_nl",
    activation_levels: Annotated[
        str, typer.Option(help="What 4-bit activations stand for: table or uniform.")
    ] = "table",
    hadamard: Annotated[
        str,
        typer.Option(
            help="Sites whose outliers are spread, as in mlp_in,mlp_mid; all; or none, for a file that "
            "llama.cpp reads, too."
        ),
    ] = "all",
    reflections: Annotated[
        bool, typer.Option(help="Mix the blocks of these transforms, too, and the heads.")
    ] = True,
    channel_scales: Annotated[
        bool, typer.Option(help="Balance what few bits carry with the weights that read it.")
    ] = True,
    key_centers: Annotated[
        bool,
        typer.Option(help="Quantize transformed keys of few bits as differences from their mean."),
    ] = True,
    wide_first_token: Annotated[
        bool, typer.Option(help="Where tokens have 4 bits, give a text's first one 8.")
    ] = True,
    recent_keys: Annotated[
        int,
        typer.Option(help="Of how many last tokens keys that have 4 bits are seen in 8.", min=0),
    ] = 16,
    importance: Annotated[
        str,
        typer.Option(
            help="Which tokens of 4:8 have 8 bits: rarity, value_peak, first_token or "
            "relative_first_token."
        ),
    ] = "rarity",
    ratio: Annotated[
        float,
        typer.Option(help="The fraction of the tokens of 4:8 that have 8 bits.", min=0, max=1),
    ] = 0.5,
    init: Annotated[str, typer.Option(help="How step sizes are found: mse or lsq.")] = "mse",
    reconstruct: Annotated[
        bool,
        typer.Option("--reconstruct", help="Train each layer by itself: some times as long."),
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; default: its own.")
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help="How many windows of 256 tokens of it: more take longer and come closer. "
            "[default: 128; nearest: 32]",
            min=1,
        ),
    ] = None,
    by_source: Annotated[bool, typer.Option(help="Clean BabyLM's files by source.")] = True,
    json: Json = None,
) -> None:
    """Quantize without training (PTQ): minutes; says how far it is from the original."""
    from dataclasses import asdict

    from squat.quantization import SquatConfig
    from squat.quantization.config import HADAMARD_SITES
    from squat.runs import LOST, advice, quantize_without_training

    bits: Any = int(activation_bits) if activation_bits.isdigit() else activation_bits
    sites = {"all": list(HADAMARD_SITES), "none": []}
    config = SquatConfig(
        weight_bits=weight_bits,
        activation_bits=bits,
        embedding_bits=embedding_bits,
        site_bits={} if cache_bits is None else {"k": cache_bits, "v": cache_bits},
        weight_steps=weight_steps,
        token_steps=token_steps,
        softmax=softmax,
        weight_levels=weight_levels,
        activation_levels=activation_levels,
        hadamard=sites.get(hadamard, hadamard.split(",")),
        reflections=reflections,
        channel_scales=channel_scales,
        key_centers=key_centers,
        wide_first_token=wide_first_token,
        recent_keys=recent_keys,
        importance=importance,
        ratio=ratio,
        init=init,
    )
    found = quantize_without_training(
        model, config, output, data, by_source, weights, reconstruct, typed(), windows
    )
    lines = [f"model: {output}", str(found)]
    if not found.kl <= LOST:  # also where it is NaN
        lines.append(f"warning: little is left of the model; {advice(config, weights)} would help")
    report("\n".join(lines), {"model": str(output), **asdict(found)}, json)


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
    json: Json = None,
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
    report(table, result, json)


@app.command(
    name="lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness with Squat's models: lm-eval --model squat --model_args path=..."""
    from squat.evaluate.tasks import run_lm_eval

    run_lm_eval(context.args)


@app.command()
def generate(
    model: Model,
    prompt: str,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="[default: 64, or what the model's context has room for]"),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: int = 0,
    session: Annotated[
        Path | None,
        typer.Option(
            help="Of a .gguf model: a file that keeps what was read, for prompts that begin alike."
        ),
    ] = None,
    speculate: Speculate = 0,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Of a .gguf file: tokens/s, GB/s, a hash of the last logits, on stderr."
        ),
    ] = False,
    json: Json = None,
) -> None:
    """Continue a text."""
    from squat.generation import Stats, continue_text

    took: list[Stats] = []
    text = []
    for piece in continue_text(
        model,
        prompt,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        took.append if stats else None,
        session,
        speculate,
    ):
        text.append(piece)
        if str(json) != "-":
            print(piece, end="", flush=True)
    result = {"text": "".join(text), "stats": took[0].as_json() if took else None}
    report("", result, json)
    if took:
        typer.echo(took[0], err=True)


@app.command()
def chat(
    model: File,
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of an answer.  [default: what the context has room for]"),
    ] = None,
    forget: Forget = False,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: int = 0,
    speculate: Speculate = 0,
) -> None:
    """Talk with a model: a line is a message; /reset, /save FILE, /quit."""
    from squat.chat import Conversation, converse
    from squat.engine import Engine

    converse(
        Conversation(
            Engine(model),
            system,
            max_new_tokens,
            forget,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            speculate=speculate,
        )
    )


@app.command()
def serve(
    model: File,
    host: Annotated[
        str, typer.Option(help="The address; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(help="What clients have to show.", envvar="SQUAT_API_KEY", show_default=False),
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", min=1)] = 1_000_000,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Of an answer.  [default: what the context has room for]", min=1),
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(help="Of work on an answer, which then ends.", min=0)
    ] = 600.0,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that wait for those being answered.", min=0)
    ] = 16,
    parallel: Annotated[int, typer.Option(help="Answers that are computed together.", min=1)] = 4,
    forget: Forget = False,
) -> None:
    """Answer requests over HTTP, as OpenAI's API does."""
    from squat.errors import ServingError

    try:
        from squat.serving.app import Limits
        from squat.serving.server import serve as run
    except ImportError as error:
        raise ServingError(
            f"serve: {error.name} is not installed; install it with pip install 'squat[serve]'"
        ) from None
    limits = Limits(max_body, max_tokens, max_seconds, max_waiting, forget, parallel)
    run(model, host, port, api_key, limits)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A quantized model's folder.")],
    out: Annotated[Path, typer.Argument(help="The .gguf file to write.")],
    verify: Annotated[
        bool, typer.Option(help="Write it only if the engine computes what the checkpoint does.")
    ] = True,
    json: Json = None,
) -> None:
    """Write a trained model's integer codes to one .gguf file, for the engine and for llama.cpp."""
    from squat.checkpoints import load_model, load_tokenizer
    from squat.data.files import check_no_folder
    from squat.deploy.export import export as write
    from squat.deploy.export import remarks
    from squat.deploy.verify import export_verified
    from squat.model_card import tell_of_file

    check_no_folder(out)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    warnings = remarks(model, tokenizer)
    for line in warnings:
        typer.echo(f"squat: warning: {line}", err=True)
    name = Path(checkpoint).resolve().name
    if verify:
        export_verified(model, tokenizer, name, out)
    else:
        write(model, tokenizer, name, out)
        warnings.append("codes, tokens and logits were not compared with the checkpoint's")
        typer.echo(f"squat: warning: {warnings[-1]}", err=True)
    tell_of_file(Path(checkpoint), out)
    size = out.stat().st_size
    report(
        f"{out}: {size / 1e6:.2f} MB",
        {"file": str(out), "bytes": size, "warnings": warnings},
        json,
    )


@app.command()
def parity(
    checkpoint: Annotated[str, typer.Argument(help="A quantized model's folder.")],
    file: Annotated[str, typer.Argument(help="The .gguf file exported from it.")],
    data: Annotated[Path, typer.Option(help="Text to compare on: a folder or a file.")],
    tokens: Annotated[int, typer.Option(help="How much of it.", min=2)] = 4096,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 128,
    by_source: Annotated[bool, typer.Option(help="Clean BabyLM's files by source.")] = True,
    json: Json = None,
) -> None:
    """Compare a checkpoint with its file: codes, tokens, and logits of PyTorch and of the engine."""
    from dataclasses import asdict
    from itertools import islice

    from squat.checkpoints import load_model, load_tokenizer
    from squat.data import read_corpus, tokenize_corpus
    from squat.deploy.parity import TEXTS, compare, parity_table

    tokenizer = load_tokenizer(checkpoint)
    ids = tokenize_corpus(data, tokenizer, by_source=by_source)[:tokens].tolist()
    windows = [ids[i : i + sequence_length] for i in range(0, len(ids), sequence_length)]
    texts = list(islice(read_corpus(data, by_source), TEXTS))
    found = compare(load_model(checkpoint), tokenizer, file, windows, texts)
    report(parity_table(found), {"holds": found.holds, **asdict(found)}, json)
    if not found.holds:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[Path | None, typer.Argument(help="A .gguf file; or give --shape.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of this shape: llama-58m, gpt2-97m, ...")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="0: one for each CPU; repeatable.  [default: 1]")
    ] = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(help="a8, a4, or 4:8=SHARE of tokens with 8 bits; repeatable.  [default: a8]"),
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option(help="4 or 8, of the layers.  [default: 4]")
    ] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="4 or 8, of head and embeddings.  [default: 8]")
    ] = None,
    isa: Annotated[str | None, typer.Option(help="Pin an instruction set; see squat info.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    generate: Annotated[int, typer.Option(help="Tokens to decode.")] = 128,
    rounds: Annotated[int, typer.Option(help="Measurements; the median counts.")] = 9,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time goes, step by step, instead.")
    ] = False,
    json: Json = None,
) -> None:
    """Measure the engine's speed, on a model file or on random weights of a shape."""
    from squat.bench import Settings, measurements_table, profile_table, run
    from squat.bench import profile as run_profile

    settings = Settings(
        shape=shape,
        model=model,
        threads=threads or [1],
        activations=tuple(activations or ()),
        weight_bits=weight_bits,
        head_bits=head_bits,
        isa=isa,
        prompt=prompt,
        generate=generate,
        rounds=rounds,
    )
    if profile:
        rows = run_profile(settings)
        report(profile_table(rows), rows, json)
        return
    measured = run(settings)
    report(measurements_table(measured), [m.as_json() for m in measured], json)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, or a name on the Hub.")],
    json: Json = None,
) -> None:
    """Whether a model will train, export and run here; why not; how large and how long."""
    from squat.check import facts
    from squat.checkpoints import load_model, load_tokenizer
    from squat.quantization import SquatConfig

    found = facts(load_model(model), load_tokenizer(model), model, SquatConfig(activation_bits=8))
    report(two_columns(found, model), found, json)


@app.command()
def info(
    json: Json = None,
) -> None:
    """What this installation and this machine can do, and what is missing."""
    from squat.info import facts

    found = facts()
    report(two_columns(found), found, json)
