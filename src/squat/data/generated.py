"""A corpus that the model writes itself, for quantization where its training text is not at hand.

After LLM-QAT (Liu et al. 2023, arXiv 2305.17888, section 3.1): every text starts with a first token
drawn at random, goes on greedily for 3 to 5 tokens, which settles it on something the model is sure
of, and is then sampled from the model's full distribution, which keeps the data as diverse as what
the model was trained on. LLM-QAT draws the first token uniformly from the vocabulary; here it is
drawn from what the model expects after <s>, since most of a vocabulary (bytes, ends of words) never
starts a text.

Every batch is a pure function of (model, settings, seed, batch number), so an interrupted run goes
on where its file ends and gives the same tokens.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squat.data.cache import cache_folder
from squat.data.files import once, readable_errors
from squat.data.packed import Tokens, digest, token_dtype
from squat.data.tokenizer import check_tokenizer, first_token
from squat.errors import DataError
from squat.modes import evaluating
from squat.terminal import progress

GREEDY = (3, 4, 5)
"""How many tokens after the first are chosen greedily: row r of a batch takes GREEDY[r % 3]."""


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    seed: int,
    sequence_length: int,
    batch_size: int = 128,
    cache: str | Path | None = None,
) -> Tokens:
    """At least `tokens` tokens of the model's own text, memory-mapped.

    Args:
        model: a causal language model; its weights are hashed into the file's name.
        tokenizer: its tokenizer; every sequence starts with its first token.
        tokens: how many; rounded up to whole sequences.
        seed: of all random draws.
        sequence_length: length of each text, at most the model's context.
        batch_size: texts sampled at a time.
        cache: a folder, made if missing; by default that of `squat.data.cache`.

    Returns:
        One dimension of ceil(tokens / sequence_length) sequences, one after the other.

    Raises:
        DataError: nothing to generate, sequences longer than the context, a tokenizer that does
            not fit, or the disk is full.
    """
    check_tokenizer(tokenizer, model.config.vocab_size)
    context = model.config.max_position_embeddings
    if not 2 <= sequence_length <= context:
        raise DataError(
            f"generate: sequence_length {sequence_length} is not between 2 and the model's "
            f"context of {context}"
        )
    if tokens < 1:
        raise DataError(f"generate: tokens is {tokens}; ask for at least one")
    dtype = token_dtype(model.config.vocab_size)
    bos, eos = first_token(tokenizer), tokenizer.eos_token_id
    assert bos is not None  # check_tokenizer has seen to it
    settings = (GREEDY, bos, eos, tokens, seed, sequence_length, batch_size)
    key = digest(weights_hash(model), *settings)
    file = cache_folder(cache) / f"generated-{key}.{dtype.__name__}"
    with once(file) as missing:
        if missing:
            rows = -(-tokens // sequence_length)
            partial = file.with_name(f"{file.name}.partial")
            row_bytes = sequence_length * np.dtype(dtype).itemsize
            with readable_errors(file), evaluating(model), partial.open("ab") as out:
                done = out.tell() // (batch_size * row_bytes)  # whole batches of an earlier run
                out.truncate(done * batch_size * row_bytes)
                with progress("generating text") as show:
                    for first in range(done * batch_size, rows, batch_size):
                        count = min(batch_size, rows - first)
                        generator = _generator(model.device, seed, first)
                        ids = sample_texts(model, count, sequence_length, bos, eos, generator)
                        out.write(ids.cpu().numpy().astype(dtype).tobytes())
                        out.flush()
                        show(first + count, rows)
            partial.replace(file)
    return np.memmap(file, dtype=dtype, mode="r")


@torch.inference_mode()
def sample_texts(
    model: PreTrainedModel,
    rows: int,
    length: int,
    bos: int,
    eos: int | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """A batch of texts that the model writes, token by token through its KV cache.

    Args:
        model: in evaluation mode.
        rows: texts in the batch.
        length: tokens of each text, bos included.
        bos: the first token of every text, and what follows an eos.
        eos: the token that ends a text, if the model has one.
        generator: of the random draws, on the model's device.

    Returns:
        [rows, length], int64.
    """
    ids = torch.full((rows, length), bos, device=model.device)
    greedy = torch.tensor([GREEDY[row % len(GREEDY)] for row in range(rows)], device=model.device)
    cache = None
    for position in range(1, length):
        previous = ids[:, position - 1]
        output = model(input_ids=previous[:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        settled = (position > 1) & (position < 2 + greedy)
        token = torch.where(settled, logits.argmax(-1), drawn)
        ids[:, position] = token if eos is None else torch.where(previous == eos, bos, token)
    return ids


def _generator(device: torch.device, seed: int, first_row: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, first_row)).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(state))


def weights_hash(model: PreTrainedModel) -> str:
    """A name for the weights of a model."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
