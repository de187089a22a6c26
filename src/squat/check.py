"""What `squat check` says of a float model before any work: whether it trains, exports and runs here."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squat.architectures import architecture_of
from squat.deploy.export import check_exportable, remarks, tokenizer_json
from squat.deploy.tokenizer import ggml_tokenizer
from squat.errors import ConfigError, SquatError
from squat.hardware import bfloat16_pays
from squat.quantization.config import SquatConfig
from squat.quantization.convert import check_convertible
from squat.quantization.modules import stored_rows
from squat.runs import CALIBRATION_TOKENS, DESCENT_SEQUENCES

TOKENS = 256
"""Of the forward pass that is timed."""
CALIBRATION_PASSES, TRAINING_PASSES = 12, 7.5
"""What calibrating with descent, and a training step with its teacher, cost a token, in forward passes of the
original in bfloat16: as on SmolLM2-135M, one core (13 minutes for 32,768 tokens, 7.5 seconds for 512)."""


def facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, config: SquatConfig
) -> dict[str, str | list[str]]:
    """Questions and their answers for this model, quantized as `config` says."""
    shape = model.config.get_text_config()
    found: dict[str, str | list[str]] = {
        "architecture": f"{model.config.model_type}, context {shape.max_position_embeddings:,}",
        "parameters": f"{model.num_parameters():,}",
        "trains": _answer(lambda: check_convertible(model)),
        "exports, and runs in the engine": _answer(
            lambda: check_exportable(model, tokenizer, config, name)
        ),
        "tokenizer": _answer(lambda: _tokenizer(tokenizer, shape.vocab_size)),
        "beware": remarks(model, tokenizer),
    }
    try:
        layers, others = _weights(model)
    except ConfigError:
        return found
    for bits in (8, 4):
        size = (layers * 4.5 + others * (bits + 0.5)) / 8e6
        found[f"file, {bits}-bit embedding and head"] = f"about {size:.0f} MB"
    seconds = _seconds_a_token(model)
    minutes = seconds * CALIBRATION_PASSES * DESCENT_SEQUENCES * CALIBRATION_TOKENS / 60
    found["squat quantize here"] = f"about {minutes:.0f} minutes"
    found["squat train here"] = f"about {1 / (seconds * TRAINING_PASSES):.0f} tokens a second"
    return found


def _answer(check: Callable[[], object]) -> str:
    """What the check says, "yes", or why not."""
    try:
        said = check()
    except SquatError as error:
        return f"no: {error}"
    return said if isinstance(said, str) else "yes"


def _tokenizer(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> str:
    found = ggml_tokenizer(tokenizer_json(tokenizer), vocab_size)
    return f"{found.model}, {found.pre}, {len(tokenizer):,} entries"


def _weights(model: PreTrainedModel) -> tuple[int, int]:
    """Elements of the matrices in all layers, and of embeddings and head, a tied one once."""
    row = architecture_of(model.config.model_type)
    layers = sum(
        stored_rows(layer.get_submodule(name)).numel()
        for layer in model.get_submodule(row.layers).children()
        for name in row.of(layer).weights
    )
    outer = {
        id(weight): weight.numel()
        for name in (*row.embeddings, row.head)
        for weight in [model.get_submodule(name).get_parameter("weight")]
    }
    return layers, sum(outer.values())


@torch.no_grad()
def _seconds_a_token(model: PreTrainedModel) -> float:
    """Of a forward pass as a teacher does it."""
    context = model.config.get_text_config().max_position_embeddings
    ids = torch.full((1, min(TOKENS, context)), 1)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16_pays()):
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            model(input_ids=ids.to(model.device), use_cache=False)
    return (time.perf_counter() - start) / ids.numel()
