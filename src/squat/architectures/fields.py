"""Fields of a transformers config, from the keys of a .gguf file that another program wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from squat.errors import CheckpointError

if TYPE_CHECKING:
    from squat.importing.file import GgufFile


def size(file: GgufFile, key: str, default: int | None = None) -> int:
    """A size, which is positive."""
    value = file.need(key, int) if default is None else file.get(key, int)
    if value is None:
        assert default is not None
        return default
    if value < 1:
        raise CheckpointError(f"{file.path}: key {key} is {value}, expected a positive number")
    return value


def layers_of(file: GgufFile, name: str) -> int:
    """The number of layers."""
    layers = size(file, f"{name}.block_count")
    if layers > len(file.tensors):
        raise CheckpointError(
            f"{file.path}: key {name}.block_count is {layers}, but there are {len(file.tensors)} tensors; "
            "take another copy"
        )
    return layers


def rope_of(file: GgufFile, name: str) -> dict[str, Any]:
    """transformers' `rope_parameters`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    base = file.get(f"{name}.rope.freq_base", float)
    if base is not None:
        rope["rope_theta"] = base
    scaling = f"{name}.rope.scaling."
    known = {scaling + key for key in ("type", "factor", "original_context_length", "finetuned")}
    unknown = [key for key in file.keys(scaling) if key not in known]
    # llama.cpp's type, where there is only a factor, is linear.
    kind = file.get(f"{scaling}type", str) or "linear"
    factor = file.get(f"{scaling}factor", float)
    if kind == "none" or not factor:
        return rope
    if unknown or kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{file.path}: key {next(iter(unknown), scaling + 'type')}: this scaling of RoPE is not "
            "supported; linear, yarn with its usual settings, and llama3's are"
        )
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        context = size(file, f"{name}.context_length")
        original = size(file, f"{scaling}original_context_length", context)
        rope["original_max_position_embeddings"] = original
    return rope


def decoder_fields(file: GgufFile, name: str) -> dict[str, Any]:
    """The fields of everything that is built like a Llama.

    Raises:
        CheckpointError: a key that is missing, or has a value that is not supported.
    """
    hidden, heads = (
        size(file, f"{name}.embedding_length"),
        size(file, f"{name}.attention.head_count"),
    )
    head_dim = size(file, f"{name}.attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(file, f"{name}.{key}", head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: key {name}.{key} is another than the {head_dim} elements of a head, which "
                "is not supported"
            )
    fields = {
        "hidden_size": hidden,
        "intermediate_size": size(file, f"{name}.feed_forward_length"),
        "num_hidden_layers": layers_of(file, name),
        "num_attention_heads": heads,
        "num_key_value_heads": size(file, f"{name}.attention.head_count_kv", heads),
        "max_position_embeddings": size(file, f"{name}.context_length"),
        "rms_norm_eps": file.need(f"{name}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": rope_of(file, name),
    }
    # Qwen2 has no such field, but heeds it.
    if name != "qwen2" or head_dim * heads != hidden:
        fields["head_dim"] = head_dim
    if name != "qwen2" and "blk.0.attn_q.bias" in file.tensors:
        fields["attention_bias"] = True
    if "blk.0.ffn_gate.bias" in file.tensors:
        fields["mlp_bias"] = True
    return fields
