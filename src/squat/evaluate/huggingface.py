"""Log-probabilities from a Hugging Face causal language model.

Everything reduces to one primitive, `log_probabilities`: for sequences of token ids, the sum of
ln p(token | tokens before it) over all tokens but the first. A text is scored by putting the
begin-of-text token in front; a perplexity is the mean over windows of a corpus.

Batches are cut from the sequences sorted by length, so that nearly no batch holds padding. Where
there is any it stands on the right, behind an attention mask: positions stay what they are, causal
attention never sees it, and a quantized model, which decides each token's width from attention
probabilities, decides as it would for the text alone. What the batch size still changes is the order
of float32 sums: noise, but one that may carry a value over a rounding boundary of a quantized model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from squat.data.tokenizer import first_token
from squat.errors import DataError
from squat.modes import evaluating
from squat.terminal import track


class HuggingFaceScorer:
    """A model and its tokenizer as a `squat.evaluate.Scorer`.

    The conventions are those of lm-evaluation-harness's `HFLM`: the context is the tokenizer's
    begin-of-text token, or its end-of-text token where it has none; the text is encoded without
    special tokens; a text that already begins with the context token does not get a second one.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
    ) -> None:
        context = first_token(tokenizer)
        if context is None:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}: neither "
                "bos_token nor eos_token is set, so a text has no context to begin with; set one of them in "
                "tokenizer_config.json"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._context = int(context)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Summed log-probability of each text, in nats, in the order given.

        Raises:
            DataError: a text longer than the model's context, or with tokens it does not know.
        """
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        sequences = [
            ids if ids[:1] == [self._context] else [self._context, *ids] for ids in encoded
        ]
        return log_probabilities(self.model, sequences, self.batch_size, "Scoring texts")


@dataclass(frozen=True)
class Prediction:
    """What a model says of the tokens of one sequence, each predicted from those before it.

    log_probabilities: nats, float64 [length - 1]; greedy: bool [length - 1], whether the token is the
    most probable one.
    """

    log_probabilities: NDArray[np.float64]
    greedy: NDArray[np.bool_]


def log_probabilities(
    model: PreTrainedModel,
    sequences: Sequence[ArrayLike],
    batch_size: int,
    description: str,
) -> list[float]:
    """Sum of ln p(ids[t] | ids[:t]) over t >= 1, for each sequence of token ids: nats.

    Arguments, order and errors are those of `predict`.
    """
    predictions = predict(model, sequences, batch_size, description)
    return [float(prediction.log_probabilities.sum()) for prediction in predictions]


def predict(
    model: PreTrainedModel,
    sequences: Sequence[ArrayLike],
    batch_size: int,
    description: str,
) -> list[Prediction]:
    """How each sequence of token ids is predicted, in the order given.

    Args:
        model: any causal language model; put in eval mode for the time of the call.
        sequences: token ids, each [length]; the lengths may differ. The last token is predicted
            but not fed.
        batch_size: sequences in one forward pass.
        description: what is said of the work while it goes on.

    Returns:
        The log-softmax is in float32.

    Raises:
        DataError: a sequence longer than the model's context, or an id outside its vocabulary.
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    predictions = [Prediction(np.zeros(0), np.zeros(0, bool))] * len(arrays)
    # longest first: a batch that does not fit in memory or in the context fails at once
    order = sorted(
        (i for i, ids in enumerate(arrays) if len(ids) > 1), key=lambda i: -len(arrays[i])
    )
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # no_grad rather than inference_mode: as fast, and what a module may cache here stays usable in
    # training
    with evaluating(model), torch.no_grad(), track(batches, description) as steps:
        for batch in steps:
            answers = _predict_batch(model, [arrays[i] for i in batch])
            for index, answer in zip(batch, answers, strict=True):
                predictions[index] = answer
    return predictions


def _predict_batch(model: PreTrainedModel, sequences: list[np.ndarray]) -> list[Prediction]:
    """The same for sequences that go through the model together."""
    lengths = np.array([len(ids) for ids in sequences])
    padded = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    check_ids(model, padded)

    ids = torch.from_numpy(padded).to(model.device)
    fed = torch.arange(ids.shape[1] - 1) < torch.from_numpy(lengths - 1)[:, None]
    fed = fed.to(model.device)
    logits = model(input_ids=ids[:, :-1], attention_mask=fed.long(), use_cache=False).logits.float()
    predicted = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    values = predicted.double().cpu().numpy()
    greedy = (logits.argmax(-1) == ids[:, 1:]).cpu().numpy()
    return [
        Prediction(v[: length - 1], g[: length - 1])
        for v, g, length in zip(values, greedy, lengths, strict=True)
    ]


def check_ids(model: PreTrainedModel, ids: np.ndarray) -> None:
    """Refuse ids [..., tokens] that the embedding tables of tokens and positions cannot look up.

    Raises:
        DataError: an id outside the model's vocabulary, or more tokens than its context, but for the last.
    """
    config = model.config
    if ids.max() >= config.vocab_size or ids.min() < 0:
        outside = ids.max() if ids.max() >= config.vocab_size else ids.min()
        raise DataError(
            f"token id {outside}: outside the model's vocabulary (vocab_size "
            f"{config.vocab_size}); use the tokenizer that the model was trained with"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and ids.shape[-1] - 1 > context:
        raise DataError(
            f"a sequence of {ids.shape[-1]} tokens: longer than the model's context "
            f"(max_position_embeddings {context}); shorten the text or the windows"
        )
