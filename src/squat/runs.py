"""Training runs: what `squat pretrain` and `squat train` do with a recipe.

A run is a folder. It holds the recipe it was started with, the Trainer's checkpoints, a log with every
loss term, a figure of it, and in the end the model:

    recipe.json  text.sha256  checkpoints/  log.json  loss.png  model/

Starting a run again resumes it at its last whole checkpoint, with the results that an uninterrupted
run would have had; a run that has its model is done. A run belongs to one process, one recipe and one
text (docs/reliability.md). Under torchrun or accelerate launch each process runs
this; a recipe's batch size is then that of one process.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from squat import replicas
from squat.checkpoints import (
    check_output,
    check_sums,
    load_model,
    load_tokenizer,
    recover,
    save_model,
)
from squat.data import (
    PackedDataset,
    check_tokenizer,
    generate_tokens,
    read_corpus,
    tokenize_corpus,
    train_tokenizer,
)
from squat.data.files import readable_errors, writing
from squat.data.packed import Tokens, is_token_file, read_tokens
from squat.data.tokenizer import check_same_tokenizer, id_limit
from squat.deploy.export import check_exportable, remarks
from squat.distill.teacher_cache import TeacherCache
from squat.distill.trainer import SequentialTrainer, SquatTrainer
from squat.errors import CheckpointError, ConfigError, DataError, UnfinishedError
from squat.exact import approximately
from squat.hardware import in_bfloat16
from squat.model_card import ModelCard
from squat.quantization import SquatConfig, quantize
from squat.quantization.config import HADAMARD_SITES
from squat.recipes import Data, PretrainRecipe, Training, TrainRecipe
from squat.reconstruction import Reconstruction, reconstruct
from squat.report.figures import loss_figure
from squat.terminal import progress

CALIBRATION_SEQUENCES = 32
DESCENT_SEQUENCES = 128
CALIBRATION_TOKENS = 256
BATCH = 8
"""Sequences of a calibration batch."""
HELD_OUT = 8
"""Sequences that a quantized model is compared with its original on."""
LOST = 1.0
"""KL to the original in nats above which little is left of a model."""


def pretrain(recipe: PretrainRecipe, max_minutes: float | None = None) -> Path:
    """Train a full-precision model from scratch; returns the folder of the model.

    Args:
        recipe: what to train.
        max_minutes: save a checkpoint and stop when so much time has passed.

    Raises:
        UnfinishedError: time was up; the same call goes on from there.
        DivergedError: a loss, a gradient or a weight became NaN or infinite.
        SquatError: the recipe, the data or the disk does not allow it.
    """
    with _alone(Path(recipe.output)):
        return _pretrain(recipe, _StopAfter(max_minutes))


def _pretrain(recipe: PretrainRecipe, stop: _StopAfter) -> Path:
    folder = Path(recipe.output)
    if _is_done(folder, recipe):
        return folder / "model"
    data = recipe.data
    if data.train is None:
        raise ConfigError("data.generate: a model that is yet to be trained cannot generate text")
    if isinstance(recipe.tokenizer, str):
        tokenizer = load_tokenizer(recipe.tokenizer)
    else:
        lines = read_corpus(data.train, data.by_source, data.field)
        tokenizer = train_tokenizer(lines, **recipe.tokenizer.model_dump())
    set_seed(recipe.training.seed)
    model = _new_model(recipe, tokenizer)
    tokens = _tokens_of(data.train, data, tokenizer)
    _check_text(folder, tokens)
    args = _arguments(folder, recipe.training)
    dataset = _dataset(tokens, data, recipe.training, args.world_size)
    trainer = SequentialTrainer(model=model, args=args, train_dataset=dataset, callbacks=[stop])
    return _run(trainer, tokenizer, folder, _whole_checkpoint(folder / "checkpoints"))


def train(recipe: TrainRecipe, max_minutes: float | None = None) -> Path:
    """Quantization-aware training of an existing model; returns the folder of the model.

    Args:
        recipe: what to train.
        max_minutes: save a checkpoint and stop when so much time has passed.

    Raises:
        UnfinishedError: time was up; the same call goes on from there.
        DivergedError: a loss, a gradient or a weight became NaN or infinite.
        SquatError: the recipe, the data, a model or the disk does not allow it.
    """
    with _alone(Path(recipe.output)):
        return _train(recipe, _StopAfter(max_minutes))


def _train(recipe: TrainRecipe, stop: _StopAfter) -> Path:
    folder = Path(recipe.output)
    if _is_done(folder, recipe):
        return folder / "model"
    tokenizer = load_tokenizer(recipe.model)
    teachers = [_teacher(name, tokenizer) for name in recipe.teachers or [recipe.model]]
    model = load_model(recipe.model)
    start = None if recipe.quantized is None else load_model(recipe.quantized)
    config = recipe.quantize if start is None else _config_of_start(start, model, recipe)
    check_tokenizer(tokenizer, model.config.vocab_size)
    _say_what_to_expect(model, tokenizer, config, recipe.model)
    set_seed(recipe.training.seed)
    tokens = _training_tokens(recipe.data, model, tokenizer, recipe.training.seed)
    _check_text(folder, tokens)
    args = _arguments(folder, recipe.training)
    kept, cache = recipe.teacher_cache, None
    dataset = _dataset(tokens, recipe.data, recipe.training, args.world_size, kept is not None)
    if kept is not None:
        cache = TeacherCache(kept.folder, teachers, dataset, recipe.loss.temperature, kept.draws)
    checkpoint = _whole_checkpoint(folder / "checkpoints")
    if checkpoint is not None:  # it has all that calibration would find
        quantize(model, config, [])
    elif start is not None:
        model = start
    else:
        count = DESCENT_SEQUENCES if recipe.weights == "descent" else CALIBRATION_SEQUENCES
        batches = _windows(dataset, count).split(BATCH)
        with progress("quantizing layers") as show:
            quantize(model, config, batches, recipe.weights, show)
        if recipe.reconstruction is not None:
            windows = _windows(dataset, recipe.reconstruction.sequences)
            with progress("training layers") as show:
                reconstruct(
                    model, teachers[0], windows, recipe.reconstruction, folder / "layers", show
                )
    trainer = SquatTrainer(
        model=model,
        teachers=teachers,
        args=args,
        train_dataset=dataset,
        loss=recipe.loss,
        cache=cache,
        step_learning_rate=recipe.training.step_learning_rate,
        freeze=recipe.training.codes == "frozen",
        callbacks=[stop],
    )
    return _run(trainer, tokenizer, folder, checkpoint, lambda log: _card_of(recipe, config, log))


def _card_of(recipe: TrainRecipe, config: SquatConfig, log: list[dict[str, Any]]) -> ModelCard:
    """The card of a trained model: the recipe, and the losses that the log ends with."""
    text = recipe.model_dump_json(indent=2, exclude=recipe.unsaid)
    made = f"`squat train recipe.yaml`, where recipe.yaml is\n\n```json\n{text}\n```"
    last = log[-1] if log else {}
    terms = ("loss", "ce", "kl", "entropy", "distribution")
    where = f"on training text, about step {last.get('step')}"
    measured = {
        f"training: {term}": f"{float(last[term]):.4f}, {where}" for term in terms if term in last
    }
    codes = "steps, norms and biases" if recipe.training.codes == "frozen" else "all weights"
    training = f"{codes}, {last.get('step')} steps"
    return ModelCard(config, recipe.model, training, made, measured)


def _say_what_to_expect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: SquatConfig, name: str
) -> None:
    """A line for each thing that export would say, before hours of training are spent; from one process.

    What cannot be exported can be trained and measured all the same.
    """
    if not replicas.is_first():
        return
    lines = remarks(model, tokenizer)
    try:
        check_exportable(model, tokenizer, config, name)
    except CheckpointError as error:
        lines.append(f"the result cannot be exported: {error}")
    for line in lines:
        print(f"squat: warning: {line}", file=sys.stderr)


def _config_of_start(
    start: PreTrainedModel, model: PreTrainedModel, recipe: TrainRecipe
) -> SquatConfig:
    """How the quantized model is quantized that training starts from, if it can be one of the original's."""
    config = getattr(start.config, "quantization_config", None)
    if not isinstance(config, SquatConfig):
        raise ConfigError(
            f"quantized: {recipe.quantized} is not quantized; make one by squat quantize"
        )
    shapes = [
        {
            name: p.shape
            for name, p in m.named_parameters()
            if "quantizer" not in name and "squat" not in name
        }
        for m in (start, model)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"quantized: {recipe.quantized} has other weights than {recipe.model}; quantize that one"
        )
    return config


def _teacher(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    check_same_tokenizer(name, load_tokenizer(name), tokenizer)
    return load_model(name)


@dataclass(frozen=True)
class Distance:
    """How far a quantized model is from its original, on `tokens` tokens of text.

    kl: mean KL(original || quantized) in nats; same: share of positions with the same most probable token.
    """

    kl: float
    same: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL to the original {self.kl:.3f} nats a token, same top token {100 * self.same:.1f} % "
            f"(on {self.tokens:,} tokens that it was not calibrated on)"
        )

    def as_rows(self) -> dict[str, str]:
        """The same for a model card."""
        where = f"on {self.tokens:,} tokens that it was not calibrated on"
        return {
            "KL to the original": f"{self.kl:.3f} nats a token, {where}",
            "same top token": f"{100 * self.same:.1f} %, {where}",
        }


def advice(config: SquatConfig, weights: str) -> str:
    """The setting of `squat quantize` that would keep more of a model of which little is left."""
    at_4_bits = config.activation_bits != 8
    settings = {
        "--weight-steps row": config.weight_steps != "row",
        "--token-steps peak": config.token_steps != "peak",
        "--hadamard all": config.hadamard != list(HADAMARD_SITES),
        "--weights descent": weights != "descent",
        "--weight-levels iq4_nl": config.weight_bits == 4 and config.weight_levels != "iq4_nl",
        "--activation-levels table": at_4_bits and config.activation_levels != "table",
        "--activation-bits 8": at_4_bits,
    }
    return next((setting for setting, helps in settings.items() if helps), "squat train")


def quantize_without_training(
    name: str,
    config: SquatConfig,
    output: Path,
    text: Path | None,
    by_source: bool,
    weights: str,
    layer_by_layer: bool = False,
    command: str | None = None,
    sequences: int | None = None,
) -> Distance:
    """Post-training quantization (PTQ): calibrate a model on some text, measure it, and save it.

    Args:
        name: the full-precision model.
        config: what to quantize.
        output: folder of the quantized model.
        text: a corpus to calibrate on; without one, the model samples some text itself.
        by_source: clean BabyLM's files by source.
        weights: "nearest" or "descent".
        layer_by_layer: train each layer by itself afterwards, on the same text.
        command: what the user typed, for the model card.
        sequences: windows of the text to calibrate on; None: 128, or 32 for "nearest".

    Raises:
        SquatError: a model, a text or a config that cannot be used, or a full disk.
    """
    check_output(output)
    original, tokenizer = load_model(name), load_tokenizer(name)
    check_tokenizer(tokenizer, original.config.vocab_size)
    _say_what_to_expect(original, tokenizer, config, name)
    usual = CALIBRATION_SEQUENCES if weights == "nearest" else DESCENT_SEQUENCES
    count = (sequences or usual) + HELD_OUT
    windows = text_windows(original, tokenizer, text, by_source, count)
    held_out = min(HELD_OUT, len(windows) // 2)
    if held_out == 0:
        raise DataError(
            f"{text}: holds {len(windows)} window of {windows.shape[1]} tokens; give at least two, one to "
            f"calibrate on and one to measure on ({count} are used)"
        )
    windows, others = windows[:-held_out], windows[-held_out:]
    model = copy.deepcopy(original)
    with progress("quantizing layers") as show:
        quantize(model, config, windows.split(BATCH), weights, show)
    if layer_by_layer:
        with progress("training layers") as show:
            reconstruct(model, original, windows, Reconstruction(), progress=show)
    found = distance(original, model, others.split(BATCH))
    made = f"```sh\n{command}\n```" if command else "By `squat.runs.quantize_without_training`."
    training = "each layer by itself" if layer_by_layer else "none"
    save_model(
        model, tokenizer, output, card=ModelCard(config, name, training, made, found.as_rows())
    )
    return found


@torch.no_grad()
def distance(original: PreTrainedModel, quantized: PreTrainedModel, batches: Any) -> Distance:
    """Compare the two on batches of token ids [batch, tokens], behind the first token of each text."""
    kl, same, tokens = 0.0, 0, 0
    with approximately():
        for batch in batches:
            expected = original(batch, use_cache=False).logits[:, 1:].float().log_softmax(-1)
            got = quantized.eval()(batch, use_cache=False).logits[:, 1:].float().log_softmax(-1)
            kl += float((expected.exp() * (expected - got)).sum())
            same += int((expected.argmax(-1) == got.argmax(-1)).sum())
            tokens += expected[..., 0].numel()
    return Distance(kl / tokens, same / tokens, tokens)


def text_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: Path | None,
    by_source: bool,
    sequences: int,
) -> torch.Tensor:
    """Windows of a text, or of what the model writes itself, each behind the first token if it has one.

    Returns:
        token ids [sequences, tokens]; fewer where the text is short, none of it twice.
    """
    length = min(CALIBRATION_TOKENS, model.config.get_text_config().max_position_embeddings)
    if text is None:
        tokens = generate_tokens(model, tokenizer, sequences * length, 0, length)
    else:
        tokens = tokenize_corpus(text, tokenizer, by_source=by_source)
    sequences = min(sequences, max(1, (len(tokens) - length + 1) // length))
    windows = _windows(PackedDataset(tokens, length, sequences, seed=0), sequences)
    if tokenizer.bos_token_id is not None:
        windows[:, 0] = tokenizer.bos_token_id
    return windows


def calibration_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: Path | None, by_source: bool
) -> list[torch.Tensor] | None:
    """What `quantize` calibrates on: windows of a text; None, its default, without one."""
    if text is None:
        return None
    windows = text_windows(model, tokenizer, text, by_source, CALIBRATION_SEQUENCES)
    return list(windows.split(BATCH))


def _windows(dataset: PackedDataset, count: int) -> torch.Tensor:
    """The first windows that training would see: [sequences, tokens]."""
    count = min(count, len(dataset))
    return torch.stack([dataset[i]["input_ids"] for i in range(count)])


def is_run_of(folder: Path, recipe: PretrainRecipe | TrainRecipe) -> bool:
    """Whether a folder holds a run of this recipe, finished or not.

    What the recipe in the folder does not mention (it was written by an earlier version) has its default.
    Where tokenized text is kept changes nothing.
    """
    file = folder / "recipe.json"
    try:
        if not file.exists():
            return False
        there = type(recipe).model_validate_json(file.read_text())
        there.data.cache = recipe.data.cache
        return there == recipe
    except ValidationError:  # it names a path that is no longer there, or is of the other kind
        return False


def _is_done(folder: Path, recipe: PretrainRecipe | TrainRecipe) -> bool:
    """Whether the run has its model; claims the folder for this recipe if it is new."""
    file = folder / "recipe.json"
    if not file.exists():
        with writing(file) as out:
            unsaid = recipe.unsaid if isinstance(recipe, TrainRecipe) else set()
            out.write(recipe.model_dump_json(indent=2, exclude=unsaid).encode())
    elif not is_run_of(folder, recipe):
        raise ConfigError(
            f"output: {folder} holds a run of another recipe ({file}); choose another output, or "
            "remove the folder to start over"
        )
    recover(folder / "model")
    return (folder / "model").exists()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other run works in the folder meanwhile; a lock that a killed process held is free again.

    Raises:
        ConfigError: there is one.
        DataError: the folder cannot be written to.
    """
    if not replicas.is_first():
        yield
        return
    with readable_errors(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"output: another process works in {folder}; wait for it, or choose another output"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _check_text(folder: Path, tokens: Tokens) -> None:
    """Refuse to go on with another text than the run began with."""
    file = folder / "text.sha256"
    found = sha256(np.ascontiguousarray(tokens).data).hexdigest()
    if not file.exists():
        with writing(file) as out:
            out.write(found.encode())
    elif file.read_text() != found:
        raise ConfigError(
            f"data: the text has changed since the run in {folder} began ({file}); bring it back, or choose "
            "another output"
        )


def _new_model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shape = recipe.model.model_dump()
    try:
        config = AutoConfig.for_model(
            **shape,
            vocab_size=id_limit(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {' '.join(str(error).split())}") from error


def _training_tokens(
    data: Data, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Tokens:
    if data.generate is not None:
        length = data.sequence_length
        return generate_tokens(
            model, tokenizer, data.generate.tokens, seed, length, cache=data.cache
        )
    assert data.train is not None
    return _tokens_of(data.train, data, tokenizer)


def _tokens_of(train: str, data: Data, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """The tokens of a text, or those that stand in a file already."""
    if is_token_file(train):
        return read_tokens(train, id_limit(tokenizer))
    return tokenize_corpus(train, tokenizer, data.cache, data.by_source, data.field)


def _dataset(
    tokens: Tokens, data: Data, training: Training, processes: int, same_windows: bool = False
) -> PackedDataset:
    per_step = training.batch_size * training.accumulate * processes
    if training.steps is not None:
        samples = training.steps * per_step
    else:
        assert training.epochs is not None
        windows = max(1, (len(tokens) - data.sequence_length + 1) // data.sequence_length)
        samples = max(1, round(training.epochs * windows / per_step)) * per_step
    return PackedDataset(tokens, data.sequence_length, samples, training.seed, same_windows)


def _arguments(folder: Path, training: Training) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=1,  # of a dataset that is as long as the run
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        use_cpu=not torch.accelerator.is_available(),
        bf16=in_bfloat16(training.precision),
        torch_compile=training.compile,
        save_steps=training.save_every,
        save_total_limit=2,
        logging_steps=training.log_every,
        logging_first_step=True,
        seed=training.seed,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,  # a sample may have the number of its window
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),  # the log's lines say how far it is
    )


class _StopAfter(TrainerCallback):
    """Saves a checkpoint and ends the training when time is up, for all processes at the same step."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.end is None:
            return
        up = torch.tensor(float(time.monotonic() > self.end), device=args.device)
        if replicas.largest(up) > 0:
            control.should_save = control.should_training_stop = True


def _run(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    checkpoint: str | None,
    card: Callable[[list[dict[str, Any]]], ModelCard] | None = None,
) -> Path:
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps:
        raise UnfinishedError(
            f"{folder}: time is up after step {step} of {steps}; run it again to go on"
        )
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    # A sharded model is put together by all processes, and written by the first.
    sharded = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
    if trainer.is_world_process_zero():
        _write_log(folder, log, time.monotonic() - started)
        model = trainer.accelerator.unwrap_model(trainer.model)
        about = None if card is None else card(log)
        save_model(model, tokenizer, folder / "model", weights, about)
    return folder / "model"


def _whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end and is what it was then; others are named."""
    paths = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(paths):
        try:
            check_sums(path)
            return str(path)
        except CheckpointError as error:
            if replicas.is_first():
                print(f"squat: warning: {error}; it is not used", file=sys.stderr)
    return None


def _write_log(folder: Path, log: list[dict[str, Any]], seconds: float) -> None:
    with writing(folder / "log.json") as out:
        out.write(json.dumps({"seconds": round(seconds, 1), "log": log}, indent=1).encode())
    with writing(folder / "loss.png") as out:
        loss_figure(log).savefig(out, format="png", dpi=120)
