"""Continue a text with a model folder or a .gguf file: what `squat generate` prints.

Both go the same way: the engine's sampler chooses each token, the same stream makes text of them, and so a
checkpoint and its file, whose logits are the same, say the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from squat.engine import Engine, Generation, hash_of, new_sampler
from squat.errors import DataError
from squat.model_names import runs_in_engine
from squat.unicode import broken_character

NEW_TOKENS = 64


@dataclass
class Stats:
    """What a run of the engine took.

    Attributes:
        prompt_tokens: of the prompt, without those that a session had already.
        prefill_seconds: until its logits and the first new token were there.
        decoded_tokens: new tokens that were evaluated.
        decode_seconds: for these.
        decode_bytes: weights, keys and values that were read for these.
        logits_hash: of the last logits; the same on every CPU.
        isa: the instruction set in use.
        threads: that computed.
    """

    prompt_tokens: int
    prefill_seconds: float
    decoded_tokens: int
    decode_seconds: float
    decode_bytes: int
    logits_hash: str
    isa: str
    threads: int

    def as_json(self) -> dict[str, Any]:
        """All fields, with the rates that they make."""
        rates: dict[str, float | None] = {
            "prefill_tokens_per_second": self.prompt_tokens / self.prefill_seconds,
            "decode_tokens_per_second": None,
            "decode_gigabytes_per_second": None,
        }
        if self.decoded_tokens:
            rates["decode_tokens_per_second"] = self.decoded_tokens / self.decode_seconds
            rates["decode_gigabytes_per_second"] = self.decode_bytes / 1e9 / self.decode_seconds
        return asdict(self) | rates

    def __str__(self) -> str:
        found = self.as_json()
        lines = [
            f"prefill  {self.prompt_tokens} tokens, {found['prefill_tokens_per_second']:,.0f} tokens/s"
        ]
        if self.decoded_tokens:
            lines.append(
                f"decode   {self.decoded_tokens} tokens, {found['decode_tokens_per_second']:,.0f} tokens/s, "
                f"{found['decode_gigabytes_per_second']:.1f} GB/s"
            )
        lines += [
            f"hash     {self.logits_hash} of the last logits: the same on every CPU",
            f"engine   {self.isa}, threads {self.threads}",
        ]
        return "\n".join(lines)


def _measured(
    engine: Engine, generation: Generation, take: Callable[[Stats], None]
) -> Iterator[str]:
    """The pieces of a generation; in the end `take` is told what it took."""
    start = first = time.perf_counter()
    for piece in generation.steps:
        if first == start and generation.new_tokens:
            first = time.perf_counter()
            engine.start_profile()
        if piece:
            yield piece
    end = time.perf_counter()
    decoded = generation.decoded_tokens
    take(
        Stats(
            generation.prompt_tokens - generation.reused_tokens,
            (first if decoded else end) - start,
            decoded,
            end - first if decoded else 0.0,
            sum(row["bytes"] for row in engine.profile()) if decoded else 0,
            hash_of(generation.logits),
            engine.info.isa,
            engine.info.threads,
        )
    )


def continue_text(
    model: str,
    prompt: str,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    stats: Callable[[Stats], None] | None = None,
    session: Path | None = None,
    speculate: int = 0,
) -> Iterator[str]:
    """The prompt and its continuation, piece by piece; by default of NEW_TOKENS, or what there is room for.

    Args:
        stats: is told in the end what the engine took; of a .gguf file only.
        session: where the engine's session is kept: what the prompt has in common with the one that is there
            is not computed again, and at the end it holds prompt and continuation.
        speculate: as in `Engine.generate`; of a .gguf file only.

    Raises:
        SquatError: a model that cannot be loaded, a prompt that is no text, settings that are not possible,
            more tokens than the model's context has room for, or a session that is none of this model.
    """
    if problem := broken_character(prompt):
        raise DataError(f"prompt: {problem}")
    if runs_in_engine(model):
        engine = Engine(model)
        if session is not None and session.exists():
            engine.load(session)
        ids = _begun(engine.tokenize(prompt), engine.info.bos_token)
        limit = _limit(ids, max_new_tokens, engine.info.context)
        yield prompt
        generation = engine.generate(
            ids,
            max_new_tokens=limit,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            speculate=speculate,
            stream=True,
        )
        yield from generation if stats is None else _measured(engine, generation, stats)
        if session is not None:
            engine.save(session)
    elif stats is not None:
        raise DataError(f"--stats: {model} is no .gguf file, and they are the engine's; export it")
    elif session is not None:
        raise DataError(
            f"session: {model} is no .gguf file, and only the engine keeps sessions; export it"
        )
    elif speculate:
        raise DataError(
            f"speculate: {model} is no .gguf file, and only the engine guesses; export it"
        )
    else:
        yield from _continue_in_pytorch(model, prompt, max_new_tokens, temperature, top_p, seed)


def _continue_in_pytorch(
    model: str,
    prompt: str,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[str]:
    import torch

    from squat.checkpoints import load_model, load_tokenizer
    from squat.evaluate.huggingface import check_ids
    from squat.special_tokens import end_tokens

    network, tokenizer = load_model(model), load_tokenizer(model)
    ids = _begun(tokenizer(prompt)["input_ids"], tokenizer.bos_token_id)
    config = network.config.get_text_config()
    limit = _limit(ids, max_new_tokens, config.max_position_embeddings)
    check_ids(network, np.array(ids))
    ends = end_tokens(network, tokenizer)
    sampler = new_sampler(config.vocab_size, temperature=temperature, top_p=top_p, seed=seed)
    stream = _TextStream(tokenizer.backend_tokenizer, ids)
    yield prompt
    cache, fed = None, ids
    for _ in range(limit):
        with torch.no_grad():
            given = torch.tensor([fed])
            output = network(
                input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        cache = output.past_key_values
        token = sampler.next(output.logits[0, -1].float().numpy())
        if token in ends:
            break
        if piece := stream.push(token):
            yield piece
        fed = [token]
    if piece := stream.rest():
        yield piece


def _begun(ids: list[int], bos: int | None) -> list[int]:
    """A prompt's tokens; of an empty one bos."""
    if ids:
        return ids
    if bos is None:
        raise DataError(
            "prompt: is empty, and the model has no bos token to begin with; give a word"
        )
    return [bos]


def _limit(ids: Sequence[int], max_new_tokens: int | None, context: int) -> int:
    """How many new tokens there may be behind a prompt."""
    room = context - len(ids) + 1  # the last new token is not fed
    if room < 1:
        raise DataError(
            f"prompt: its {len(ids)} tokens exceed the model's context of {context}; shorten it"
        )
    if max_new_tokens is None:
        return min(NEW_TOKENS, room)
    if max_new_tokens > room:
        raise DataError(
            f"max_new_tokens: {max_new_tokens} new tokens behind the prompt's {len(ids)} exceed the model's "
            f"context of {context}; give at most {room}, or a shorter prompt"
        )
    return max_new_tokens


class _TextStream:
    """Text of tokens as they come: what is new in the text of all, once no character is cut in two."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(prompt)
        self._told = len(tokenizer.decode(self._ids))

    def push(self, token: int) -> str:
        """The new text after one more token; "" while a character is incomplete."""
        self._ids.append(token)
        return "" if self._text().endswith("\ufffd") else self.rest()

    def rest(self) -> str:
        """What has not been returned."""
        text = self._text()
        new, self._told = text[self._told :], len(text)
        return new

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids)
