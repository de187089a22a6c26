"""Squat's models in lm-evaluation-harness: `squat lm-eval --model squat --model_args path=...`.

lm-eval finds models in a list of its own and has no way to announce others to it (0.4.13), so importing this
module puts `squat` on that list, and `squat lm-eval` is lm-eval's own command line behind that import: all
its options, tasks and output are its own.

`path` is a model's folder, which runs in PyTorch, or a .gguf file, which runs in the engine. Requests mean
what they mean to lm-eval's `hf` model, with one choice made: every text begins with the model's
begin-of-text token, as its training text did. (`hf` leaves that to the tokenizer's template.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from squat.engine import Engine, Generation
from squat.errors import ConfigError
from squat.model_names import runs_in_engine
from squat.terminal import track

Answer = tuple[float, bool]
"""Log-probability of a continuation in nats, and whether greedy decoding would give it."""


_TOGETHER = 8
"""Texts that the engine continues in one pass."""


@dataclass(frozen=True)
class Wish:
    """A text to be continued: its tokens, how many more at most, what ends it, and how they are chosen."""

    prompt: list[int]
    length: int
    stop: list[str]
    sampling: Any


class _Backend(Protocol):
    """What runs the model: token ids in, answers out."""

    context: int
    prefix: int | None
    end: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Answer]:
        """For pairs of what is given and what is to be predicted, which fit the context together."""
        ...

    def generate(self, wishes: Iterable[Wish]) -> Iterator[tuple[int, str]]:
        """The texts wished for, each with the index of its wish, in any order."""
        ...


class _Checkpoint:
    """A model's folder, in PyTorch."""

    def __init__(self, path: str, batch_size: int, device: str | None) -> None:
        import torch

        from squat.checkpoints import load_model, load_tokenizer

        model: Any = load_model(path)
        # lm-eval says "cuda:0" unless told otherwise, whether there is one or not.
        accelerated = device is not None and torch.accelerator.is_available()
        self.model = model.to(device) if accelerated else model
        self.tokenizer = load_tokenizer(path)
        self.batch_size = batch_size
        self.context = int(self.model.config.max_position_embeddings)
        self.prefix = self.tokenizer.bos_token_id
        self.end = self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Answer]:
        from squat.evaluate.huggingface import predict

        sequences = [given + wanted for given, wanted in pairs]
        found = predict(self.model, sequences, self.batch_size, "Scoring")
        return [
            (
                float(prediction.log_probabilities[-len(wanted) :].sum()),
                bool(prediction.greedy[-len(wanted) :].all()),
            )
            for prediction, (_, wanted) in zip(found, pairs, strict=True)
        ]

    def generate(self, wishes: Iterable[Wish]) -> Iterator[tuple[int, str]]:
        for index, wish in enumerate(wishes):
            yield index, self._generate(wish)

    def _generate(self, wish: Wish) -> str:
        import torch

        from squat.special_tokens import end_tokens

        given = torch.tensor([wish.prompt], device=self.model.device)
        greedy = wish.sampling["temperature"] == 0
        answer = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=wish.length,
            do_sample=not greedy,
            pad_token_id=self.end,
            eos_token_id=end_tokens(self.model, self.tokenizer) or None,
            **({} if greedy else wish.sampling),
            **({"stop_strings": wish.stop, "tokenizer": self.tokenizer} if wish.stop else {}),
        )
        return self.decode(answer[0, len(wish.prompt) :].tolist())


class _File:
    """A .gguf file, in the engine."""

    def __init__(self, path: str, threads: int) -> None:
        self.engine = Engine(path, threads=threads)
        info = self.engine.info
        self.context, self.prefix, self.end = info.context, info.bos_token, info.eos_token

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.engine.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.detokenize(ids)

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Answer]:
        with track(pairs, "Scoring") as steps:
            return [self._score(given, wanted) for given, wanted in steps]

    def _score(self, given: list[int], wanted: list[int]) -> Answer:
        logits = self.engine.logits_behind(given, wanted).astype(np.float64)
        greedy = bool((logits.argmax(-1) == wanted).all())
        logits -= logits.max(-1, keepdims=True)
        chosen = logits[np.arange(len(wanted)), wanted] - np.log(np.exp(logits).sum(-1))
        return float(chosen.sum()), greedy

    def generate(self, wishes: Iterable[Wish]) -> Iterator[tuple[int, str]]:
        begun, texts = dict[int, Generation](), dict[int, str]()

        def answers() -> Iterator[Generation]:
            for index, wish in enumerate(wishes):
                options = {"stop": wish.stop, "stream": True, **wish.sampling}
                begun[index] = self.engine.generate(wish.prompt, wish.length, **options)
                texts[index] = ""
                yield begun[index]

        for index, piece in self.engine.batch(_TOGETHER).run(answers()):
            texts[index] += piece
            if begun[index].finish_reason is not None:
                del begun[index]
                yield index, texts.pop(index)


@register_model("squat")
class SquatLM(TemplateLM):
    """A checkpoint of transformers, quantized or not, or a .gguf file.

    Args:
        path: a model's folder or Hub name, or a .gguf file.
        batch_size: sequences in a forward pass of a folder's model; "auto" is 64.
        max_length: the most tokens that are given and predicted together; the model's context.
        device: of a folder's model.
        threads: of the engine; 0: one for each CPU.
        max_batch_size: taken because lm-eval may pass it; not used.

    Raises:
        SquatError: no path, an argument that does not exist, or a model that cannot be loaded.
    """

    def __init__(
        self,
        path: str = "",
        batch_size: int | str = 64,
        max_length: int | None = None,
        device: str | None = None,
        threads: int = 0,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown or not path:
            said = f"{next(iter(unknown))!r} does not exist" if unknown else "path is missing"
            raise ConfigError(
                f"--model_args: {said}; give path=FOLDER or path=FILE.gguf, and perhaps max_length, threads"
            )
        size = 64 if str(batch_size).startswith("auto") else int(batch_size)
        self.path = path
        self._backend: _Backend = (
            _File(path, int(threads)) if runs_in_engine(path) else _Checkpoint(path, size, device)
        )
        self.max_length = min(int(max_length or self._backend.context), self._backend.context)
        if self._backend.prefix is None and self._backend.end is None:
            raise ConfigError(f"{path}: neither a begin- nor an end-of-text token to start from")

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm-eval's request cache."""
        return self.path

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, or the begin-of-text token of a model without one."""
        end = self._backend.end
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What an empty context consists of."""
        prefix = self._backend.prefix
        if prefix is None:
            prefix = self._backend.end
        assert prefix is not None
        return prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, behind the begin-of-text token unless told otherwise."""
        ids = self._backend.encode(string)
        if add_special_tokens is False or ids[:1] == [self.prefix_token_id]:
            return ids
        return [self.prefix_token_id, *ids]

    def tok_decode(self, tokens: Sequence[int], **kwargs: Any) -> str:
        """The text of token ids."""
        return self._backend.decode(tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Answer]:
        pairs = []
        for _, given, wanted in requests:
            # The context loses its beginning where both together are too long; the last token is
            # predicted but not fed.
            ids = [*given, *wanted][-(self.max_length + 1) :]
            wanted = wanted[-(len(ids) - 1) :]
            pairs.append((ids[: len(ids) - len(wanted)], wanted))
        return self._backend.score(pairs)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows of the context: nats."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            for given, wanted in map(make_disjoint_window, rolling):
                windows.append((None, given, wanted))
                owners.append(index)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [answer for answer, _ in self._loglikelihood_tokens(windows)])
        found: list[float] = totals.tolist()
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to a stop string, the end-of-text token or a number of tokens."""
        wishes = [self._wish(request) for request in requests]
        answers = [""] * len(wishes)
        with track(wishes, "Generating") as begun:
            for index, text in self._backend.generate(begun):
                answers[index] = str(postprocess_generated_text(text, wishes[index].stop, None))
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _wish(self, request: Instance) -> Wish:
        text, settings = request.args
        options: Any = normalize_gen_kwargs(settings, min(256, self.max_length // 2))
        length = min(options["max_gen_toks"], self.max_length - 1)
        sampling = {
            name: options[name] for name in ("temperature", "top_p", "top_k") if name in options
        }
        sampling.setdefault("temperature", 0.0)
        stop = [term for term in options["until"] if term]
        ids = self.tok_encode(text, add_special_tokens=False)
        room = self.max_length - length - 1  # behind the begin-of-text token
        ids = [self.prefix_token_id, *ids[max(len(ids) - room, 0) :]]
        return Wish(ids, length, stop, sampling)


def run(arguments: Sequence[str]) -> None:
    """lm-eval's own command line."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["squat lm-eval", *arguments]
    cli_evaluate()
