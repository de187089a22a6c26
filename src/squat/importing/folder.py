"""A .gguf file becomes a model's folder: `squat import`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from squat.checkpoints import check_output, quiet, save_model
from squat.importing.file import GgufFile
from squat.importing.model import read_model
from squat.importing.tokenizer import read_tokenizer


def import_model(path: str, folder: Path) -> dict[str, str]:
    """Write a .gguf file's model and tokenizer to a folder, which appears complete or not at all.

    Args:
        path: a file that another program wrote.
        folder: a model that is there is replaced.

    Returns:
        What was made, by name.

    Raises:
        CheckpointError: a file that cannot be imported, a folder that is no model's, or a full disk.
    """
    check_output(folder)
    file = GgufFile(path)
    tokenizer = read_tokenizer(file)
    with quiet():
        model = read_model(file)
    save_model(model, tokenizer, folder)
    types = Counter(tensor.tensor_type.name for tensor in file.tensors.values())
    around = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    special = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token}
    return {
        "model": str(folder),
        "architecture": f"{model.config.model_type}, {model.config.num_hidden_layers} layers",
        "parameters": f"{model.num_parameters():,}, float32",
        "in the file": ", ".join(f"{kind} ({count})" for kind, count in types.most_common()),
        "tokenizer": f"{len(tokenizer):,} tokens, "
        f"{file.get('tokenizer.ggml.model', str)} {file.get('tokenizer.ggml.pre', str) or ''}",
        "special tokens": ", ".join(f"{role} {text}" for role, text in special.items() if text),
        "around a text": " ".join(around) or "nothing",
        "chat template": "yes" if tokenizer.chat_template else "no",
    }
