"""The engine from Python: a .gguf file, text in, text, scores and logits out.

Everything is computed by the C++ engine, in integers, as the model was trained; text becomes tokens there,
too, as it does in squat-run. This module adds streaming, conversations and typed errors. Neither torch nor
transformers is imported.

A session remembers the tokens of the last text: what a new prompt has in common with it from the beginning
is not computed again. Logits depend on the tokens alone, and so nobody can tell, but by the time it takes.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer
from typing_extensions import Unpack

from squat import _native
from squat.chat_template import ChatTemplate, Message, turns
from squat.drafts import Drafts
from squat.errors import ChatError, EngineError, ToolsError
from squat.forms import Form, Holder, Tool, tokenizer_of
from squat.text_stream import StopStrings, TextStream
from squat.tool_calls import OPEN
from squat.unicode import broken_character

if TYPE_CHECKING:
    from squat.batch import Batch

_Text = TypeVar("_Text")
_Result = TypeVar("_Result")

_PREFILL = 512
"""Prompt tokens between two looks at Ctrl-C; the logits do not depend on it."""
MOST_GUESSES = 32
"""What a session can take back is more."""


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
    """A model file with one session. One engine serves one thread at a time; engines are independent, also
    where they share a model (`share`).

    Args:
        path: a .gguf file written by `squat export`.
        threads: threads that compute; 0: one for each CPU that this process may use.
        context: the most tokens of a session; 0: the model's own limit.

    Raises:
        EngineError: the file is missing, damaged or no Squat file, or an argument is out of range.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, context: int = 0) -> None:
        _check_sizes(threads, context)
        self._path = os.fspath(path)
        self._start(_native.Engine(self._path, threads, context))

    def _start(self, native: _native.Engine) -> None:
        self._native = native
        info = native.info()
        kernels = (line.split(": ", 1) for line in info.pop("kernels").splitlines())
        bos = info.pop("bos_token")
        self._info = EngineInfo(**info, kernels=dict(kernels), bos_token=None if bos < 0 else bos)
        self._turn = 0  # counts the calls that use the session

    def share(self, threads: int = 0, context: int = 0) -> Engine:
        """Another engine of the same model, with an empty session of its own: weights are in memory once.

        Both may compute at the same time, each in one thread.

        Args:
            threads, context: like the engine's own.

        Raises:
            EngineError: an argument out of range, or no memory.
        """
        _check_sizes(threads, context)
        other = type(self).__new__(type(self))
        other._path = self._path
        other._start(self._native.share(threads, context))
        return other

    def batch(self, size: int = 8, context: int = 0) -> Batch:
        """Sessions of this model whose tokens are computed together, by this engine.

        Args:
            size: how many.
            context: of each; 0: as long as this engine's. No longer than that.

        Raises:
            EngineError: an argument out of range, or no memory.
        """
        from squat.batch import Batch

        return Batch(self, size, context)

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

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, perhaps not whole characters; none of a control token.

        Raises:
            EngineError: an id out of range.
        """
        return self._native.piece(token)

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

    def logits_behind(self, prompt: ArrayLike, ids: ArrayLike) -> NDArray[np.float32]:
        """Logits in front of each of the tokens that follow a prompt: float32 [ids, vocabulary].

        They are those of `logits` on all tokens. What the session has of the prompt already, from the
        beginning, is not computed again: many continuations of one prompt cost little more than themselves.

        Raises:
            EngineError: like `logits`; both need at least one token.
        """
        given, wanted = _tokens(prompt), _tokens(ids)
        if not given.size or not wanted.size:
            raise EngineError("prompt, ids: one of them has no tokens")
        kept = self._begin_with(given.tolist())
        if kept < len(given) - 1:
            self._native.append(given[kept:-1])
        return np.asarray(self._native.eval(np.append(given[-1], wanted[:-1]), all=True))

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
        self._turn += 1
        return np.asarray(self._native.eval(_tokens([token])))[0]

    def rewind(self, length: int) -> None:
        """Forget all tokens of the session but the first `length`.

        The last 128 tokens can always be taken back, and so can all. What looks at a few tokens only (a
        window, a convolution, keys of 4 bits that are seen in 8 when they are new) holds little more than
        those: beyond, evaluate the text again.

        Raises:
            EngineError: the session has fewer, or no longer holds what the next token would see.
        """
        self._turn += 1
        self._native.rewind(length)

    @property
    def tokens(self) -> list[int]:
        """The tokens of the session."""
        return self._native.tokens()

    def widths(self, begin: int = 0) -> NDArray[np.uint8] | None:
        """The bits, 8 or 4, that each layer gave the session's tokens: uint8 [layers, tokens].

        They are those of the layer's values; what is next computed from them has the same. None if the model
        gives all its tokens one width.

        Args:
            begin: the first token that is asked for.

        Raises:
            EngineError: the session has fewer tokens.
        """
        if begin < 0:
            raise EngineError(f"begin: {begin} is negative")
        widths = np.asarray(self._native.widths(begin))
        return widths if len(widths) else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session, its tokens and what the engine holds of them, to a file.

        An engine of the same model file goes on from there (`load`), on any CPU. The file is written under
        another name, then renamed. It holds the text in full.

        Raises:
            EngineError: the file cannot be written.
        """
        self._native.save_session(os.fspath(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the session by one that `save` wrote: logits from there on are the same, bit for bit.

        The file may come from anybody; the session stays as it was if it is refused.

        Raises:
            EngineError: the file is missing, damaged, of another version or of another model file, or its
                session has more tokens than the context.
        """
        self._turn += 1
        self._native.load_session(os.fspath(path))

    def score(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text in nats, summed over its tokens.

        The context is that of a model's folder (`HuggingFaceScorer`): the begin-of-text token, or the
        end-of-text token of a model without one, once. What a text has in common with the one before it, from
        the beginning, is not computed again.

        Raises:
            EngineError: a text is longer than the context, or the model has neither token.
        """
        if isinstance(texts, str):
            raise EngineError("texts: is one string; give a list of strings")
        return self._each(texts, lambda text: self._native.score(self._scored_tokens(text)))

    def score_tokens(self, texts: Sequence[str]) -> list[TokenScores]:
        """The log-probability of each token of each text in nats; their sum is what `score` gives.

        Raises:
            EngineError: like `score`.
        """

        def score(text: str) -> TokenScores:
            ids = self._scored_tokens(text)
            return TokenScores(tuple(ids[1:].tolist()), tuple(self._native.score_tokens(ids)))

        return self._each(texts, score)

    def _scored_tokens(self, text: str) -> NDArray[np.int32]:
        """The tokens of a text behind the one that stands for its beginning."""
        info = self.info
        context = info.eos_token if info.bos_token is None else info.bos_token
        if context is None:
            raise EngineError("the model has neither a bos nor an eos token to begin with")
        ids = self.tokenize(text)[len(self.tokenize("")) :]
        return _tokens(ids if ids[:1] == [context] else [context, *ids])

    def hidden_states(self, ids: ArrayLike) -> NDArray[np.float32]:
        """What the last norm makes of each of the tokens, a new session: float32 [tokens, hidden].

        The last of transformers' `hidden_states`, bit for bit: the head's input before it is transformed and
        quantized.

        Raises:
            EngineError: like `logits`.
        """
        tokens = _tokens(ids)
        self._begin()
        return np.asarray(self._native.eval_hidden(tokens))

    def embed(
        self, texts: Sequence[str | Sequence[int]], pooling: Literal["mean", "last"] = "mean"
    ) -> NDArray[np.float32]:
        """A vector of length 1 for each text, made of its tokens' `hidden_states`: float32 [texts, hidden].

        A model that was trained to continue texts, and not to embed them, has vectors that are all rather
        alike: compare them with each other, not with a fixed threshold.

        Args:
            texts: as `tokenize` reads them, what its tokenizer puts in front included; or token ids.
            pooling: "mean" of all tokens, or the "last" one, which alone has seen the whole text.

        Raises:
            EngineError: a text without tokens or longer than the context, or an unknown pooling.
        """
        if pooling not in ("mean", "last"):
            raise EngineError(f"pooling: {pooling!r} is unknown; choose mean or last")

        def embed(text: str | Sequence[int]) -> NDArray[np.float32]:
            ids = self.tokenize(text) if isinstance(text, str) else text
            states = self.hidden_states(ids).astype(np.float64)
            vector = states.mean(axis=0) if pooling == "mean" else states[-1]
            return (vector / max(float(np.linalg.norm(vector)), 1e-30)).astype(np.float32)

        rows = self._each(texts, embed)
        return np.array(rows, np.float32).reshape(len(rows), self.info.hidden_size)

    def _each(self, texts: Sequence[_Text], function: Callable[[_Text], _Result]) -> list[_Result]:
        """A function of each text, and whose fault an error is."""
        if isinstance(texts, str):
            raise EngineError("texts: is one string; give a list of strings")
        self._begin()
        results = []
        for index, text in enumerate(texts):
            try:
                results.append(function(text))
            except EngineError as error:
                raise EngineError(f"texts: element {index}: {error}") from None
        return results

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[GenerationOptions],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = ...,
        *,
        stream: Literal[True],
        **options: Unpack[GenerationOptions],
    ) -> Generation: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        form: Form | None = None,
        speculate: int = 0,
        stream: bool = False,
    ) -> str | Generation:
        """Continue a text; the result is the continuation only.

        It ends with an end-of-sequence token, a stop string, `max_new_tokens`, or a full context.

        Args:
            prompt: the text to continue; or its token ids, which are then taken as they are.
            max_new_tokens: the most tokens to generate; None: as many as the context has room for.
            temperature: 0 takes the most probable token; the filters below then say nothing.
            top_k: keep the k most probable tokens; 0: all.
            top_p: keep the fewest tokens whose probabilities reach it; 1: all.
            min_p: drop tokens less probable than min_p times the most probable one; 0: none.
            repetition_penalty: above 1 discourages tokens that were there; 1: off.
            seed: equal seeds give equal texts.
            stop: strings that end the text where the first of them appears; it is left out.
            logprobs: of how many most probable tokens a stream's `logprobs` tell, beside the chosen one's.
            form: what the continuation has to be (module `forms`); it ends where it is.
            speculate: the most tokens that are guessed from the text itself and computed along with the next
                one (module `drafts`). The text is the same; one that repeats much is there sooner.
            stream: return an iterator of pieces of text, each as soon as it is known.

        Raises:
            EngineError: a setting or a token out of range, or a prompt longer than the context.
        """
        if max_new_tokens is not None and max_new_tokens < 0:
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
        unknown = next((i for i in ids if not 0 <= i < self.info.vocab_size), None)
        if unknown is not None:
            raise EngineError(
                f"prompt: token {unknown} is outside the vocabulary of {self.info.vocab_size}"
            )
        limit = self.info.context if max_new_tokens is None else max_new_tokens
        if not 0 <= speculate <= MOST_GUESSES:
            raise EngineError(f"speculate: {speculate} is not from 0 to {MOST_GUESSES}")
        if logprobs is not None and not 0 <= logprobs <= self.info.vocab_size:
            raise EngineError(f"logprobs: {logprobs} is not from 0 to {self.info.vocab_size}")
        holder = None if form is None else Holder(self._form_tokenizer, form)
        pieces = Generation(
            self, ids, sampler, limit, StopStrings(stop), logprobs, holder, speculate
        )
        return pieces if stream else "".join(pieces)

    @cached_property
    def _form_tokenizer(self) -> Any:
        tokens = [self.token_bytes(token) for token in range(self.info.vocab_size)]
        return tokenizer_of(tokens, self.info.eos_tokens, self._native.tokenize)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` will find one in the file."""
        return self._string("tokenizer.chat_template") is not None

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template, which the file carries.

        Raises:
            ChatError: the file has none, or one that is no Jinja program.
        """
        source = self._string("tokenizer.chat_template")
        if source is None:
            raise ChatError(
                f"{self._path}: has no chat template (key tokenizer.chat_template); export it again from a "
                "checkpoint with a chat_template.jinja, or use squat generate, which needs none"
            )
        key = "squat.tokenizer.special_tokens"
        try:
            names = dict(json.loads(self._string(key) or "{}"))
        except (ValueError, TypeError):
            raise ChatError(f"{self._path}: key {key} is no JSON object; export it again") from None
        return ChatTemplate(source, names, self._path)

    def chat_tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        room: int | None = None,
    ) -> list[int]:
        """Token ids of the prompt for the assistant's next message.

        Args:
            messages: mappings with a `role` (system, user, assistant, tool) and a `content`, in their order.
            tools: that the model may call, as OpenAI's API has them. What it says to call one has the form of
                `tool_calls.ToolCallReader`, and `forms.tool_calls` holds it to that.
            room: tokens that the context is to have left behind the prompt: as few turns as that takes are
                left out, the oldest ones (`chat_template.turns`). The last one stays. None: all stay.

        Raises:
            ToolsError: the template does not let a model call tools, or not in a form that is known here.
            ChatError: a file without a chat template, or messages that the template makes no prompt of.
        """
        ids = self._prompt(messages, tools)
        if room is None or len(ids) + room <= self.info.context:
            return ids
        begin = turns(messages)

        def without(oldest: int) -> list[int]:
            rest = [*messages[: begin[0]], *messages[begin[oldest] :]]
            return self._prompt(rest, tools)

        def fits(oldest: int) -> bool:
            return len(without(oldest)) + room <= self.info.context

        return without(bisect_left(range(len(begin) - 1), True, key=fits))

    def _prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        text = self.chat_template.render(messages, tools)
        mark = self.tokenizer.token_to_id(OPEN) if tools else None
        if mark is not None and not self.token_bytes(mark):
            raise ToolsError(
                f"tools: {OPEN} is a control token of {self._path}, which leaves no text; leave them out"
            )
        return self.tokenize(text)[len(self.tokenize("")) :]  # the template writes bos itself

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = ...,
        *,
        tools: Sequence[Tool] | None = ...,
        forget: bool = ...,
        stream: Literal[False] = ...,
        **options: Unpack[GenerationOptions],
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = ...,
        *,
        tools: Sequence[Tool] | None = ...,
        forget: bool = ...,
        stream: Literal[True],
        **options: Unpack[GenerationOptions],
    ) -> Generation: ...

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        *,
        tools: Sequence[Tool] | None = None,
        forget: bool = False,
        stream: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> str | Generation:
        """The assistant's next message in a conversation.

        Args:
            messages, tools: like `chat_tokens`.
            max_new_tokens: the most tokens; None: as many as the context has room for.
            forget: where the context has no room for the answer, read no more of the conversation than leaves
                it room, see `chat_tokens` and `room_of`.
            stream: like `generate`.
            **options: like `generate`.

        Raises:
            ChatError: like `chat_tokens`.
            EngineError: like `generate`.
        """
        ids = self.chat_tokens(messages, tools, self.room_of(max_new_tokens) if forget else None)
        pieces = self.generate(ids, max_new_tokens, stream=True, **options)
        return pieces if stream else "".join(pieces)

    def room_of(self, max_new_tokens: int | None) -> int:
        """Tokens that an answer should find room for: the most it may have, or a quarter of the context."""
        return self.info.context // 4 if max_new_tokens is None else max_new_tokens

    def _string(self, key: str) -> str | None:
        """What the file has for a key; None where it has nothing."""
        try:
            return self._native.string(key)
        except EngineError:
            return None

    def shared_tokens(self, prompt: Sequence[int]) -> int:
        """How many tokens the session and a prompt have in common, from the beginning."""
        pairs = list(zip(self.tokens, prompt, strict=False))
        return next((i for i, (held, asked) in enumerate(pairs) if held != asked), len(pairs))

    def _begin(self) -> None:
        """Start a new session."""
        self.rewind(0)

    def _begin_with(self, prompt: list[int]) -> int:
        """Rewind to what session and prompt have in common, the last token apart: its logits are needed."""
        kept = min(self.shared_tokens(prompt), len(prompt) - 1)
        try:
            self.rewind(kept)
        except EngineError:  # something does not look, and so does not reach, that far back
            kept = 0
            self._begin()
        return kept

    def _step(self, turns: Sequence[tuple[Engine, list[int]]]) -> NDArray[np.float32]:
        """Continue sessions of this model; logits after each one's tokens: float32 [turns, vocabulary].

        This session stays as it is.
        """
        return np.asarray(self._native.step([(e._native, _tokens(ids)) for e, ids in turns]))

    def _feed(self, ids: list[int], all: bool) -> NDArray[np.float32]:
        """Continue the session; logits after the last token, or after all: float32 [rows, vocabulary]."""
        return np.asarray(self._native.eval(_tokens(ids), all=all))

    def _take_back(self, count: int) -> None:
        """Forget the last tokens of the session, which whoever uses it has not spoken of."""
        if count > 0:
            self._native.rewind(self._native.length() - count)


def _check_sizes(threads: int, context: int) -> None:
    for name, value in (("threads", threads), ("context", context)):
        if not 0 <= value < 2**32:
            raise EngineError(f"{name}: {value} is out of range; 0 chooses")


class GenerationOptions(TypedDict, total=False):
    """Options of `Engine.generate` and `Engine.chat`, which the former explains."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    logprobs: int | None
    form: Form | None
    speculate: int


@dataclass(frozen=True)
class TokenScores:
    """The tokens of a text, and the natural logarithm of each one's probability behind those before it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model thought of a token that was chosen, and of others in its place.

    Natural logarithms of the probabilities before temperature and filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most probable tokens, the first one first; of equal ones the lower id."""


class Generation(Iterator[str]):
    """Pieces of text, each as soon as it is known, and what there is to say about them.

    Nothing is computed before the first piece is asked for, and nothing after the last one was.

    Attributes:
        engine: whose session it has.
        prompt: token ids.
        prompt_tokens: how many these are.
        reused_tokens: how many of them were not computed again.
        new_tokens: so far, without the one that ends a text.
        decoded_tokens: how many of them were evaluated; the last one need not be.
        accepted_tokens: how many of these were guessed before they were chosen.
        logprobs: of the tokens so far, if they were asked for.
        finish_reason: "stop" after an end-of-sequence token, a stop string or a complete form; "length" after
            the last token that there was room for; None before the end.
        logits: after the last token that was evaluated: float32 [vocabulary]; none before the first.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        sampler: _native.Sampler,
        limit: int,
        stop: StopStrings,
        top: int | None,
        holder: Holder | None,
        speculate: int,
    ) -> None:
        self.engine, self._sampler, self._limit, self._stop = engine, sampler, limit, stop
        self._holder, self._speculate, self.prompt = holder, speculate, prompt
        self._top, self.logprobs = top, list[TokenLogprobs]()
        self.prompt_tokens, self.reused_tokens, self.new_tokens = len(prompt), 0, 0
        self.decoded_tokens, self.accepted_tokens = 0, 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self.logits: NDArray[np.float32] = np.empty(0, np.float32)

    def __next__(self) -> str:
        """The next piece that is not empty."""
        for piece in self.steps:
            if piece:
                return piece
        raise StopIteration

    @cached_property
    def steps(self) -> Iterator[str]:
        """The same in smaller steps, each at most a chunk of the prompt or the tokens of one pass.

        Most pieces of text may be empty. For who wants to look at the clock in between.
        """
        return self._steps()

    def _steps(self) -> Iterator[str]:
        engine, work = self.engine, self.work(self.engine, self._speculate)
        piece, ids = next(work)
        turn = engine._turn
        while ids:
            self._check(turn)
            if self.new_tokens or len(ids) <= _PREFILL:
                piece, ids = work.send(engine._feed(ids, all=self.new_tokens > 0))
            else:
                engine._native.append(_tokens(ids[:_PREFILL]))
                piece, ids = "", ids[_PREFILL:]
            yield piece

    def work(
        self, engine: Engine, speculate: int = 0
    ) -> Generator[tuple[str, list[int]], NDArray[np.float32], None]:
        """The answer by a session: pieces, each with what it takes to go on.

        These are tokens to append, none with the last pieces. To be sent are the logits after the last token
        of the prompt, and from then on after each of the tokens: float32 [rows, vocabulary]. It is one
        token each time but where `speculate` guesses are wanted.
        """
        self.engine = engine
        prompt, context, holder = self.prompt, engine.info.context, self._holder
        self.reused_tokens = engine._begin_with(prompt)
        self._sampler.accept(_tokens(prompt))
        rows = yield "", prompt[self.reused_tokens :]
        text = TextStream(engine._native, prompt)
        drafts = Drafts(prompt, speculate) if speculate else None
        guessed: list[int] = []  # tokens of the session that nobody has chosen yet,
        right = 0  # and how many of them have been chosen since
        pieces = ""
        reason: Literal["stop", "length"] = "length"
        for count in range(1, self._limit + 1):
            logits = self.logits = rows[right]
            token = self._sampler.next(holder.allowed(logits) if holder else logits)
            if token in engine.info.eos_tokens:
                reason = "stop"
                break
            self.new_tokens = count
            if self._top is not None:
                self.logprobs.append(_logprobs(logits, token, self._top))
            if holder:
                holder.accept(token)
            pieces += self._stop.push(text.push(token))
            if drafts:
                drafts.push(token)
            if self._stop.found or (holder and holder.complete):
                reason = "stop"
                break
            room = min(self._limit - count, context - len(prompt) - count + 1)
            if room <= 0:
                break
            self.decoded_tokens = count
            if right < len(guessed) and token == guessed[right]:
                right += 1
                continue
            if drafts:
                engine._take_back(len(guessed) - right)
                drafts.learn(right)
                self.accepted_tokens += right
                guessed, right = drafts.guess(room - 1), 0
            rows = yield pieces, [token, *guessed]
            pieces = ""
        engine._take_back(len(guessed) - right)
        self.accepted_tokens += right
        if not self._stop.found:
            pieces += self._stop.push(text.rest())
            pieces += self._stop.rest()
        self.finish_reason = "stop" if self._stop.found else reason
        yield pieces, []

    def _check(self, turn: int) -> None:
        if turn != self.engine._turn:
            raise EngineError("stream: another call has used this engine in the meantime")


def hash_of(logits: NDArray[np.float32]) -> str:
    """A short name for logits, 16 hexadecimal digits: FNV-1a of their bytes.

    The engine's are the same on every CPU: equal hashes, equal computations.
    """
    return f"{_native.hash_logits(logits):016x}"


def _logprobs(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprobs:
    shifted = logits.astype(np.float64) - logits.max()
    values = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-values, kind="stable")[:top].tolist()
    return TokenLogprobs(token, float(values[token]), tuple((i, float(values[i])) for i in best))


load = Engine
"""How one speaks of it: `squat.load("model.gguf")`."""


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
