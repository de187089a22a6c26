"""The engine from Python: a .gguf file, text in, text, scores and logits out.

Everything is computed by the C++ engine, in integers, as the model was trained; text becomes tokens there,
too, as it does in squat-run. This module adds streaming and typed errors. Neither torch nor transformers
is imported.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from squat import _native
from squat.errors import EngineError
from squat.unicode import broken_character

_PREFILL = 512
"""Prompt tokens between two looks at Ctrl-C; the logits do not depend on it."""


@dataclass(frozen=True)
class EngineInfo:
    """What was loaded and what it runs on.

    `context`: the most tokens that prompt and answer may have together. `weight_bytes`: packed weights in
    memory. `cache_bytes`: keys and values of a full context; less is touched before. `isa`: the instruction
    set in use. `kernels`: by widths such as "a4 w4" (activations, weights), which kernel computes the
    products and why. `bos_token`: None if the model has none; whether a text begins with it is for the
    tokenizer to say. `eos_tokens`: any of them ends an answer.
    """

    architecture: str
    vocab_size: int
    layers: int
    hidden_size: int
    context: int
    threads: int
    file_bytes: int
    weight_bytes: int
    cache_bytes: int
    isa: str
    kernels: dict[str, str]
    bos_token: int | None
    eos_tokens: tuple[int, ...]

    @property
    def eos_token(self) -> int | None:
        """The tokenizer's, if the model has one."""
        return self.eos_tokens[0] if self.eos_tokens else None


class Engine:
    """A model file with one session. One engine serves one thread at a time; engines are independent.

    Args:
        path: a .gguf file written by `squat export`.
        threads: threads that compute; 0: one for each CPU that this process may use.
        context: the most tokens of a session; 0: the model's own limit.

    Raises:
        EngineError: the file is missing, damaged or no Squat file, or an argument is out of range.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, context: int = 0) -> None:
        for name, value in (("threads", threads), ("context", context)):
            if not 0 <= value < 2**32:
                raise EngineError(f"{name}: {value} is out of range; 0 chooses")
        self._native = _native.Engine(os.fspath(path), threads, context)
        info = self._native.info()
        kernels = (line.split(": ", 1) for line in info.pop("kernels").splitlines())
        bos = info.pop("bos_token")
        self._info = EngineInfo(**info, kernels=dict(kernels), bos_token=None if bos < 0 else bos)
        self._turn = 0  # counts the calls that use the session

    @property
    def info(self) -> EngineInfo:
        """What was loaded and what it runs on."""
        return self._info

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside the file as the tokenizers library has it: the same tokens for a text."""
        tokenizer = Tokenizer.from_str(self._native.string("tokenizer.huggingface.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def wide_share(self) -> list[float]:
        """Per layer, the fraction of all tokens evaluated so far that got 8 bits at "4:8" sites."""
        wide, tokens = self._native.wide_counts()
        return [count / max(tokens, 1) for count in wide]

    def start_profile(self) -> None:
        """Count, from now on, what every step of the graph costs; two looks at the clock a step."""
        self._native.set_profiling(True)

    def profile(self) -> list[dict[str, Any]]:
        """What was counted since `start_profile`, a row for each step in the order of computation.

        Keys: `step`, `seconds`, `macs` (integer multiply-accumulates), `bytes` (packed weights, keys and
        values read), `calls`.
        """
        return self._native.profile()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, behind what its tokenizer puts in front of one.

        Raises:
            EngineError: a string with half a character (a lone surrogate), which is no text.
        """
        if problem := broken_character(text):
            raise EngineError(f"text: {problem}")
        return self._native.tokenize(text.encode())

    def detokenize(self, ids: ArrayLike) -> str:
        """The text of token ids, special tokens left out.

        Raises:
            EngineError: an id out of range.
        """
        return self._native.detokenize(_tokens(ids)).decode("utf-8", "replace")

    def logits(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Logits after each of the tokens, which start a new session: float32 [tokens, vocabulary].

        Raises:
            EngineError: no tokens, an id out of range, or more tokens than the context.
        """
        tokens = _tokens(ids)
        self._begin()
        return np.asarray(self._native.eval(tokens, all=True))

    def logits_in_chunks(self, ids: ArrayLike, size: int) -> Iterator[NDArray[np.float32]]:
        """The rows of `logits(ids)`, evaluated `size` tokens at a time: the same, bit for bit.

        Raises:
            EngineError: like `logits`, or a size below 1.
        """
        if size < 1:
            raise EngineError(f"size: {size} is below 1")
        tokens = _tokens(ids)
        self._begin()
        for begin in range(0, len(tokens), size):
            yield np.asarray(self._native.eval(tokens[begin : begin + size], all=True))

    def prefill(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Start a new session with a prompt; logits after its last token: float32 [vocabulary].

        Raises:
            EngineError: like `logits`.
        """
        tokens = _tokens(ids)
        self._begin()
        return np.asarray(self._native.eval(tokens))[0]

    def decode(self, token: int) -> NDArray[np.float32]:
        """Continue the session with one token; logits after it: float32 [vocabulary].

        Raises:
            EngineError: an id out of range, or the context is full.
        """
        return np.asarray(self._native.eval(_tokens([token])))[0]

    def rewind(self, length: int) -> None:
        """Forget all tokens of the session but the first `length`.

        The last 128 tokens can always be taken back, and so can all. Layers that look at a few tokens only,
        by a window or a convolution, hold little more than those: beyond, evaluate the text again.

        Raises:
            EngineError: the session has fewer, or a layer no longer holds what the next token would see.
        """
        self._turn += 1
        self._native.rewind(length)

    def score(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text in nats, summed over its tokens.

        The context is that of a model's folder (`HuggingFaceScorer`): the begin-of-text token, or the
        end-of-text token of a model without one, once.

        Raises:
            EngineError: a text is longer than the context, or the model has neither token.
        """
        if isinstance(texts, str):
            raise EngineError("texts: is one string; give a list of strings")
        info = self.info
        context = info.eos_token if info.bos_token is None else info.bos_token
        if context is None:
            raise EngineError("texts: the model has neither a bos nor an eos token to begin with")
        self._begin()
        sums = []
        in_front = len(self.tokenize(""))
        for index, text in enumerate(texts):
            ids = self.tokenize(text)[in_front:]
            if ids[:1] != [context]:
                ids = [context, *ids]
            try:
                sums.append(self._native.score(_tokens(ids)))
            except EngineError as error:
                raise EngineError(f"texts: element {index}: {error}") from None
        return sums

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = ...,
        *,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        seed: int = ...,
        stream: Literal[False] = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = ...,
        *,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        seed: int = ...,
        stream: Literal[True],
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Continue a text; the result is the continuation only.

        It ends with an end-of-sequence token, `max_new_tokens`, or a full context.

        Args:
            prompt: the text to continue; or its token ids, which are then taken as they are.
            max_new_tokens: the most tokens to generate.
            temperature: 0 takes the most probable token; the filters below then say nothing.
            top_k: keep the k most probable tokens; 0: all.
            top_p: keep the fewest tokens whose probabilities reach it; 1: all.
            min_p: drop tokens less probable than min_p times the most probable one; 0: none.
            repetition_penalty: above 1 discourages tokens that were there; 1: off.
            seed: equal seeds give equal texts.
            stream: return an iterator of pieces of text, each as soon as it is known.

        Raises:
            EngineError: a setting out of range, or a prompt longer than the context.
        """
        if max_new_tokens < 0:
            raise EngineError(f"max_new_tokens: {max_new_tokens} is negative")
        sampler = new_sampler(
            self.info.vocab_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        ids = self.tokenize(prompt) if isinstance(prompt, str) else _tokens(prompt).tolist()
        if not ids and self.info.bos_token is not None:
            ids = [self.info.bos_token]
        if not ids:
            raise EngineError("prompt: is empty, and the model has no bos token to begin with")
        if len(ids) > self.info.context:
            raise EngineError(
                f"prompt: its {len(ids)} tokens exceed the context of {self.info.context}"
            )
        pieces = self._pieces(ids, sampler, max_new_tokens)
        return pieces if stream else "".join(pieces)

    def _begin(self) -> int:
        """Start a new session; whoever used the one before can tell by the number."""
        self.rewind(0)
        return self._turn

    def _pieces(self, prompt: list[int], sampler: _native.Sampler, limit: int) -> Iterator[str]:
        turn = self._begin()
        tokens = _tokens(prompt)
        sampler.accept(tokens)
        last = (len(tokens) - 1) // _PREFILL * _PREFILL
        for begin in range(0, last, _PREFILL):
            self._native.append(tokens[begin : begin + _PREFILL])
        logits = self._native.eval(tokens[last:])
        text = _TextStream(self._native, prompt)
        for count in range(1, limit + 1):
            token = sampler.next(logits[0])
            if token in self.info.eos_tokens:
                break
            if piece := text.push(token):
                yield piece
            if count == limit or self._native.length() == self.info.context:
                break
            if turn != self._turn:
                raise EngineError("stream: another call has used this engine in the meantime")
            logits = self._native.eval(_tokens([token]))
        if piece := text.rest():
            yield piece


def new_sampler(
    vocab_size: int,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> _native.Sampler:
    """What chooses the next token from logits; see `Engine.generate`.

    Raises:
        EngineError: a setting out of range.
    """
    for name, value, limit in (("top_k", top_k, 2**32), ("seed", seed, 2**64)):
        if not 0 <= value < limit:
            raise EngineError(f"{name}: {value} is out of range")
    return _native.Sampler(vocab_size, repetition_penalty, temperature, top_k, top_p, min_p, seed)


def _tokens(ids: ArrayLike) -> NDArray[np.int32]:
    """Ids as the native engine takes them."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise EngineError(f"ids: {array.dtype} {list(array.shape)}, expected a list of integers")
    wide = array.astype(np.int64)
    if array.size and not -(2**31) <= wide.min() <= wide.max() < 2**31:
        raise EngineError(f"ids: {wide.min()} to {wide.max()} are out of range")
    return wide.astype(np.int32)


class _TextStream:
    """Text of tokens as they come, never cutting a character in two: together, the text of all of them.

    A character may need several tokens; what is no UTF-8 becomes U+FFFD.
    """

    def __init__(self, engine: _native.Engine, prompt: list[int]) -> None:
        self._engine = engine
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(engine.detokenize(_tokens(prompt)))  # it may end inside of a character
        self._begins = not any(map(engine.piece, prompt))  # a text, which may lose a space

    def push(self, token: int) -> str:
        """The new text after one more token; "" while a character is incomplete."""
        piece = self._engine.piece(token)
        if piece and self._begins:
            piece, self._begins = self._engine.detokenize(_tokens([token])), False
        return self._decoder.decode(piece)

    def rest(self) -> str:
        """What has not been returned: U+FFFD if a character has no end."""
        return self._decoder.decode(b"", final=True)
