"""Continue a text with a model folder or a .gguf file: what `squat generate` prints."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

from squat.errors import DataError
from squat.evaluate.tasks import runs_in_engine


def continue_text(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """The prompt and its continuation, piece by piece.

    Raises:
        SquatError: a model that cannot be loaded, or settings that are not possible.
    """
    yield prompt
    if runs_in_engine(model):
        from squat.engine import Engine

        yield from Engine(model).generate(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stream=True,
        )
    else:
        yield from _continue_in_pytorch(model, prompt, max_new_tokens, temperature, top_p, seed)


def _continue_in_pytorch(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    import torch
    from transformers import TextIteratorStreamer

    from squat.checkpoints import load_model, load_tokenizer
    from squat.special_tokens import end_tokens

    network: Any = load_model(model)
    tokenizer = load_tokenizer(model)
    ids = tokenizer(prompt)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise DataError("prompt: is empty, and the model has no bos token to begin with")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    worker = Thread(
        target=network.generate,
        kwargs={
            "inputs": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0,
            "eos_token_id": end_tokens(network, tokenizer) or None,
            "streamer": streamer,
            **sampling,
        },
    )
    worker.start()
    yield from streamer
    worker.join()
