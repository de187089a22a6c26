"""From a checkpoint to a file: `squat export CHECKPOINT OUT.gguf`.

The codes are read off the quantizers that the trained model's forward pass uses; nothing is quantized a
second time. Where a weight of a transformers module belongs in the file stands in `squat.architectures`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squat.architectures import Architecture, architecture_of
from squat.architectures.architecture import Rows
from squat.chat_template import ChatTemplate
from squat.deploy.chat_pieces import chat_pieces
from squat.deploy.gguf import (
    KEY_CENTER,
    MAX_CONTEXT,
    MAX_CONTEXT_OF_ROWS,
    TOKEN_SITES,
    CodeMatrix,
    GgufModel,
    GgufSite,
    write_gguf,
)
from squat.deploy.tokenizer import ggml_tokenizer
from squat.errors import ChatError, CheckpointError
from squat.exact import ExactRMSNorm
from squat.quantization.config import FLOAT, SITES, SquatConfig
from squat.quantization.levels import LEVELS
from squat.quantization.modules import QuantizedWeight, SiteQuantizer
from squat.quantization.quantizers import method_of
from squat.quantization.tokens import ThresholdPolicy
from squat.special_tokens import disagreements, end_tokens
from squat.terminal import track


def tokenizer_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of a tokenizer's tokenizer.json."""
    return tokenizer.backend_tokenizer.to_str()


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, file: str | Path
) -> None:
    """Write a quantized model to a .gguf file.

    Args:
        model: quantized, trained or not.
        tokenizer: its tokenizer, which has the last word on bos and eos.
        name: what the file says the model is called.
        file: appears complete or not at all.

    Raises:
        CheckpointError: a float model, or bits, a policy or an architecture that the engine has not.
    """
    write_gguf(file, describe(model, tokenizer, name))


def check_exportable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: SquatConfig, name: str
) -> Architecture:
    """The architecture of a model that can be exported once it is quantized as `config` says.

    Raises:
        CheckpointError: bits, a policy, something in the graph or a tokenizer that the engine has not.
    """
    row = architecture_of(model.config.model_type)
    shape = model.config.get_text_config()
    _check_deployable(name, shape, config, row)
    ggml_tokenizer(tokenizer_json(tokenizer), shape.vocab_size)
    return row


def remarks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What a user of the exported file should know, in a sentence each."""
    context = model.config.get_text_config().max_position_embeddings
    found = disagreements(model, tokenizer)
    config = getattr(model.config, "quantization_config", None) or SquatConfig()
    of_rows = config.token_steps == "peak" or config.softmax == "base2"
    most = MAX_CONTEXT_OF_ROWS if of_rows else MAX_CONTEXT
    if context > most:
        found.append(
            f"max_position_embeddings is {context}, but the engine holds {most} tokens; it refuses "
            "longer texts"
        )
    return found


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> GgufModel:
    """What stands in the file of a quantized model; raises like `export`."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, SquatConfig):
        raise CheckpointError(f"{name}: not quantized; train it with squat train first")
    row = check_exportable(model, tokenizer, config, name)
    shape = model.config.get_text_config()
    layers = model.get_submodule(row.layers)
    heads = shape.num_attention_heads
    matrices: dict[str, CodeMatrix] = {}
    floats: dict[str, NDArray[np.float32]] = {}
    tied = {row.head} if shape.tie_word_embeddings else set()
    for path, place in row.model_names.items():
        if path not in tied:
            _add(model.get_submodule(path), place, matrices, floats)
    with track(list(layers.children()), "reading codes of layers") as steps:
        for index, layer in enumerate(steps):
            for path, place in row.of(layer).layer_names.items():
                order = row.file_order.get(path, _as_they_are)
                place = f"blk.{index}.{place}"
                _add(layer.get_submodule(path), place, matrices, floats, order, heads)
            for site in layer.modules():
                if isinstance(site, SiteQuantizer) and site.center is not None:
                    floats[f"blk.{index}.{KEY_CENTER}"] = site.center.flatten().numpy()
    sites = _sites(model, config, shape.num_hidden_layers)
    ffn_size = len(matrices["blk.0.ffn_up"].codes)
    template = _chat_template(tokenizer)
    special_tokens = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
    return GgufModel(
        architecture=row.gguf,
        name=name,
        hidden_size=shape.hidden_size,
        layers=shape.num_hidden_layers,
        ffn_size=ffn_size,
        heads=heads,
        kv_heads=getattr(shape, "num_key_value_heads", heads),
        head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        context_length=shape.max_position_embeddings,
        norm_epsilon=getattr(shape, row.epsilon),
        matrices=matrices,
        floats=floats,
        sites=sites,
        tokenizer_json=tokenizer_json(tokenizer),
        peak_steps=config.token_steps == "peak",
        base2_softmax=config.softmax == "base2",
        thresholds=_thresholds(layers) if config.token_adaptive else None,
        importance=config.importance if config.token_adaptive else None,
        token_ranks=model.base_model.get_buffer("token_ranks").tolist()
        if config.ranks_tokens
        else None,
        wide_first_token=config.wide_first_token
        and any("4" in sites[name].bits for name in TOKEN_SITES),
        recent_keys=max(m.recent for m in model.modules() if isinstance(m, SiteQuantizer)),
        graph=row.graph(shape),
        keys=row.keys(shape),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        chat_template=template,
        special_tokens=special_tokens,
        chat_pieces=_chat_pieces(template, special_tokens, name),
    )


def _chat_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """A checkpoint's template for plain conversations; beside it there may be others, by name."""
    found: str | dict[str, str] | None = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _chat_pieces(template: str | None, special_tokens: dict[str, str], name: str) -> dict[str, str]:
    """Of a template that is none the engine says so when it is used."""
    if template is None:
        return {}
    try:
        return chat_pieces(ChatTemplate(template, special_tokens, name))
    except ChatError:
        return {}


def _check_deployable(name: str, shape: Any, config: SquatConfig, row: Architecture) -> None:
    """Raises CheckpointError for whatever the engine cannot compute as the model does."""
    if config.token_adaptive and config.policy != "threshold":
        raise CheckpointError(
            f"{name}: policy {config.policy!r} looks at tokens that are yet to come and cannot be "
            "deployed; train with policy threshold"
        )
    for field, bits in (
        ("weight_bits", config.weight_bits),
        ("embedding_bits", config.embedding_bits),
    ):
        if bits == FLOAT:
            raise CheckpointError(f"{name}: {field} is {FLOAT}, float; the engine has 4 and 8 bits")
    if method_of(config.method).one_sided:
        raise CheckpointError(
            f"{name}: method {config.method!r} has unsigned activations, which the engine has not; "
            f"it is there to compare with; train with {config.method.removesuffix('-one-sided')}"
        )
    convolutions = row.graph(shape).convolutions
    if convolutions is not None and all(convolutions):
        raise CheckpointError(
            f"{name}: layer_types: no layer has attention, of which the engine needs one; take a model that "
            "has"
        )
    for field, values in row.only.items():
        if (value := getattr(shape, field)) not in values:
            raise CheckpointError(
                f"{name}: {field} is {value!r}, which the engine cannot compute; it can with "
                f"{' or '.join(map(repr, values))}"
            )


def _as_they_are(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    return rows


def _add(
    module: nn.Module,
    place: str,
    matrices: dict[str, CodeMatrix],
    floats: dict[str, NDArray[np.float32]],
    order: Rows = _as_they_are,
    heads: int = 1,
) -> None:
    """A module's weight as codes if it is quantized, as floats otherwise, and its bias."""
    if isinstance(module, QuantizedWeight):
        quantizer = module.weight_quantizer
        codes = module.codes().numpy()
        steps = quantizer.step.detach().numpy().ravel()  # one for each row, or one for all
        matrices[place] = CodeMatrix(
            np.ascontiguousarray(order(codes, heads)),
            quantizer.bits,
            order(np.resize(steps, len(codes)), heads),
            None if quantizer.levels is None else tuple(quantizer.levels),
        )
    else:
        weight = module.gain() if isinstance(module, ExactRMSNorm) else module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.Conv1d):  # of one input a channel
            weight = weight[:, 0]
        floats[f"{place}.weight"] = weight.detach().float().numpy()
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        floats[f"{place}.bias"] = order(bias.detach().float().numpy(), heads)


def _thresholds(layers: nn.Module) -> list[float]:
    """By layer; 0 where there is no attention to decide."""
    policies = [
        [part for part in layer.modules() if isinstance(part, ThresholdPolicy)]
        for layer in layers.children()
    ]
    return [found[0].threshold.item() if found else 0.0 for found in policies]


def _sites(model: PreTrainedModel, config: SquatConfig, layers: int) -> dict[str, GgufSite]:
    """How every site quantizes."""
    found: dict[str, dict[int, SiteQuantizer]] = {name: {} for name in SITES}
    for module in model.modules():
        if isinstance(module, SiteQuantizer):
            found[module.site][module.layer] = module
    numbers = dict.fromkeys(SITES, range(layers)) | {"head_in": range(layers, layers + 1)}
    return {
        name: _site([found[name].get(i) for i in numbers[name]], str(config.bits_of(name)))
        for name in SITES
    }


def _site(layers: list[SiteQuantizer | None], bits: str) -> GgufSite:
    """One site, from its quantizers of all layers; None where a layer has no such site."""
    present = [layer for layer in layers if layer is not None]
    if not any(layer.adaptive for layer in present):  # as before the first attention
        bits = bits.rpartition(":")[2]

    def steps(width: int) -> list[float] | None:
        values = [
            0.0
            if layer is None or str(width) not in layer.by_width
            else layer.quantizer(width).step.item()
            for layer in layers
        ]
        return values if any(values) else None

    def margin(width: int) -> int | None:
        found = [
            layer.margin[width]
            for layer in present
            if layer.token_steps == "exponent" and width in layer.margin
        ]
        return found[0] if found else None

    # What is done to queries is said at k.
    blocks = [1 if layer is None or layer.site == "q" else layer.block for layer in layers]
    levels = [
        [0] * LEVELS if layer is None or layer.levels is None else layer.levels.tolist()
        for layer in layers
    ]
    return GgufSite(
        bits,
        steps(8),
        steps(4),
        margin(8),
        margin(4),
        hadamard=blocks if max(blocks) > 1 else None,
        levels4=levels if any(layer.levels is not None for layer in present) else None,
    )
