"""From the modules of a float model to those of a fake-quantized one.

Which module is which site stands in `squat.architectures`. The model stays the plain transformers model that
it was; linear layers and embeddings are replaced by their quantized counterparts under the same parameter
names, sites become child modules with a hook, and attention goes through `squat_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from squat.architectures import Architecture, architecture_of
from squat.architectures.architecture import Exact
from squat.errors import ConfigError
from squat.quantization.attention import IMPLEMENTATION, AttentionSites, TokenState
from squat.quantization.config import FLOAT, SquatConfig
from squat.quantization.hadamard import fold, hadamard, power_of_two_in
from squat.quantization.levels import WEIGHT_LEVELS
from squat.quantization.modules import NARROW, QUANTIZED, SiteQuantizer, stored_rows
from squat.quantization.quantizers import method_of
from squat.quantization.tokens import POLICIES


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _quantize_input(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Forward pre-hook: the module's input becomes its site's quantized activations.

    A plain function that finds its quantizer through the module, so that a deep copy of a model uses
    its own quantizers.
    """
    site: SiteQuantizer = module.input_quantizer  # type: ignore[assignment]
    state: TokenState = module.token_state  # type: ignore[assignment]
    wide = state.width_for(site)
    quantized = site(_first_input(args, kwargs), None if wide is None else wide[..., None])
    if args:
        return (quantized, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": quantized}


def _see_first(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of a decoder: which of its tokens are the first of their texts."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    batch, count = tokens.shape[:2]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:  # padding may stand in front
        first = ((mask.cumsum(dim=1) == 1) & (mask != 0))[:, -count:]
    else:
        past = kwargs.get("past_key_values")
        begin = 0 if past is None else past.get_seq_length()
        first = torch.arange(begin, begin + count, device=tokens.device)[None] == 0
        if positions is not None:  # several texts may stand in a row
            first = first | (positions == 0)
    state: TokenState = module.token_state  # type: ignore[assignment]
    state.first = first.expand(batch, count)


def _look_up_ranks(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of a decoder: the ranks of its tokens in the vocabulary."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        raise ConfigError(
            "importance: rarity looks at token ids, and this call has none; pass input_ids, or quantize "
            "with another importance"
        )
    state: TokenState = module.token_state  # type: ignore[assignment]
    ranks: Tensor = module.token_ranks  # type: ignore[assignment]
    state.ranks = ranks[tokens]


def _lend_cache(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of an attention module: its sites need the KV cache to remember widths in."""
    sites: AttentionSites = module.squat  # type: ignore[assignment]
    # Its name is another from architecture to architecture.
    sites.cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)


def _hand_on_widths(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of what stands in place of an attention: tokens keep the width that they had."""
    state: TokenState = module.token_state  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    if layer - 1 in state.wide:
        state.wide[layer] = state.wide[layer - 1]


def site_of(module: nn.Module) -> SiteQuantizer:
    """The quantizer of a converted module's input."""
    site = module.input_quantizer
    assert isinstance(site, SiteQuantizer)
    return site


def _attach_input_site(module: Any, site: SiteQuantizer, state: TokenState) -> None:
    module.input_quantizer = site
    module.token_state = state
    module.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _convert_weight(model: nn.Module, name: str, bits: int, config: SquatConfig) -> None:
    if bits == FLOAT:
        return
    module = model.get_submodule(name)
    quantized = QUANTIZED.get(type(module))
    if quantized is None:
        raise ConfigError(f"{name}: a {type(module).__name__} cannot be quantized")
    rows, columns = module.get_parameter("weight").shape
    shape: tuple[int, ...] = (1,)
    if config.weight_steps == "row":  # of outputs, which are the columns of a Conv1D's weight
        shape = (1, columns) if isinstance(module, Conv1D) else (rows, 1)
    levels = WEIGHT_LEVELS[config.weight_levels] if bits == NARROW else None
    quantizer = method_of(config.method).weights(bits, shape=shape, levels=levels)
    model.set_submodule(name, quantized.wrap(module, quantizer))


def _convert_attention(
    attention: nn.Module,
    config: SquatConfig,
    state: TokenState,
    layer: int,
    layers: int,
    rotated: int,
    key_heads: int,
    head_size: int,
    first: int,
) -> None:
    block = config.block_of("k", head_size)
    sites = {
        name: SiteQuantizer(name, layer, config, block if name in ("q", "k") else 1, first)
        for name in ("q", "k", "probs", "v")
    }
    policy = POLICIES[config.policy](config.ratio) if config.token_adaptive else None
    if config.centers_keys(layer, first):
        sites["k"].center = torch.zeros(key_heads, 1, head_size)
    attention.squat = AttentionSites(
        sites, policy, config.importance, state, layer, layers, rotated
    )
    attention.register_forward_pre_hook(_lend_cache, with_kwargs=True)


def _make_exact(parent: nn.Module, table: Mapping[str, Exact]) -> None:
    for name, replacement in table.items():
        parent.set_submodule(name, replacement(parent.get_submodule(name)))


def _head_size(shape: Any) -> int:
    size: int = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return size


def _key_heads(shape: Any) -> int:
    heads: int = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    return heads


def _tie_head(model: PreTrainedModel, row: Architecture, block: int) -> None:
    """A tied head is one tensor with two uses: one quantizer, one set of codes, transformed or not."""
    source, target = row.embeddings[0], row.head
    model.get_submodule(source).block = block  # type: ignore[assignment]
    quantizer = model.get_submodule(source).weight_quantizer
    model.get_submodule(target).weight_quantizer = quantizer
    tied = {f"{target}.weight_quantizer.log_step": f"{source}.weight_quantizer.log_step"}
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tied}
    model.all_tied_weights_keys.update(tied)


def check_convertible(model: PreTrainedModel) -> Architecture:
    """The model's row, if it can be quantized; otherwise ConfigError."""
    if hasattr(model, "token_state"):
        raise ConfigError("model: it is quantized already; start from the full-precision one")
    return architecture_of(model.config.model_type)


def convert(model: PreTrainedModel, config: SquatConfig) -> None:
    """Give a model the structure of `config`, in place; step sizes stay unset.

    Raises:
        ConfigError: an architecture without a row, or a model that is quantized already.
    """
    row = check_convertible(model)
    state = TokenState()
    layers = list(model.get_submodule(row.layers).children())
    shape = model.config.get_text_config()
    head_size = _head_size(shape)
    key_heads = _key_heads(shape)
    rotated = row.graph(shape).rotated_of(head_size)
    first = next((i for i, layer in enumerate(layers) if row.attends(layer)), len(layers))
    for index, layer in enumerate(layers):
        own = row.of(layer)
        for name in own.weights:
            _convert_weight(layer, name, config.weight_bits, config)
        for site, name in own.inputs.items():
            size = stored_rows(layer.get_submodule(own.readers[site][0])).shape[1]
            block, inner = config.block_of(site, size), 1
            if site == "attn_out":  # the values of a head are transformed already
                inner = power_of_two_in(head_size)
                block = block if row.attends(layer) else 1
            quantizer = SiteQuantizer(site, index, config, block, first, inner)
            _attach_input_site(layer.get_submodule(name), quantizer, state)
        attention = layer.get_submodule(own.attention)
        if row.attends(layer):
            _convert_attention(
                attention, config, state, index, len(layers), rotated, key_heads, head_size, first
            )
        else:
            attention.token_state = state  # type: ignore[assignment]
            attention.register_forward_pre_hook(_hand_on_widths, with_kwargs=True)
        _make_exact(layer, own.exact)
    for name in (*row.embeddings, row.head):
        _convert_weight(model, name, config.embedding_bits, config)
    head = model.get_submodule(row.head)
    block = 1
    if config.embedding_bits != FLOAT:
        block = config.block_of("head_in", stored_rows(head).shape[1])
    _attach_input_site(head, SiteQuantizer("head_in", len(layers), config, block), state)
    _make_exact(model, row.model_exact)
    if shape.tie_word_embeddings and config.embedding_bits != FLOAT:
        _tie_head(model, row, block)
    model.token_state = state  # type: ignore[assignment]
    decoder = model.base_model
    decoder.token_state = state  # type: ignore[assignment]
    if config.wide_first_token:
        decoder.register_forward_pre_hook(_see_first, with_kwargs=True)
    if config.ranks_tokens:
        ranks = torch.arange(shape.vocab_size, dtype=torch.int32)
        decoder.register_buffer("token_ranks", ranks)
        decoder.register_forward_pre_hook(_look_up_ranks, with_kwargs=True)
    model.set_attn_implementation(IMPLEMENTATION)


@torch.no_grad()
def fold_transforms(model: PreTrainedModel, config: SquatConfig) -> None:
    """Let the weights of a float model's converted modules expect transformed inputs, in place."""
    row = architecture_of(model.config.model_type)
    for layer in model.get_submodule(row.layers).children():
        own = row.of(layer)
        for site, name in own.inputs.items():
            quantizer = site_of(layer.get_submodule(name))
            if quantizer.block > 1:
                for reader in own.readers[site]:
                    weight = stored_rows(layer.get_submodule(reader))
                    weight.copy_(fold(weight, quantizer.block, quantizer.inner))
        if "attn_out" in config.hadamard and row.attends(layer):
            _transform_values(layer, row, model.config.get_text_config())
    head = model.get_submodule(row.head)
    if (block := site_of(head).block) > 1:
        stored_rows(head).copy_(fold(stored_rows(head), block))  # a tied embedding with it


def _transform_values(layer: nn.Module, row: Architecture, shape: Any) -> None:
    """Let the values of each head come out transformed, and the output projection expect them so.

    Probabilities mix tokens, not the elements of a value: what is done to each value is done to their mean.
    """
    size = _head_size(shape)
    heads = _key_heads(shape)
    block = power_of_two_in(size)
    module = layer.get_submodule(row.value)
    bias = getattr(module, "bias", None)
    for made in (stored_rows(module), bias):
        if made is not None:
            part = row.value_rows(made, heads, size)
            part.copy_(hadamard(part.movedim(1, -1).contiguous(), block).movedim(-1, 1))
    for reader in row.readers["attn_out"]:
        weight = stored_rows(layer.get_submodule(reader))
        weight.copy_(fold(weight, block))


def self_generated_text(model: PreTrainedModel, sequences: int = 16, tokens: int = 64) -> Tensor:
    """Token ids [sequences, tokens] that the model samples itself, the same every time.

    Text for calibration when none is at hand; activations on it are closer to those on real text than
    on random tokens (LLM-QAT, arXiv 2305.17888, trains on nothing else).
    """
    config = model.config.get_text_config()
    first = config.bos_token_id if config.bos_token_id is not None else 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generate: Any = model.generate
        return generate(
            torch.full((sequences, 1), first, device=model.device),
            attention_mask=torch.ones(sequences, 1, device=model.device, dtype=torch.long),
            do_sample=True,
            min_new_tokens=tokens - 1,
            max_new_tokens=tokens - 1,
        )
