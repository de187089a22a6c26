"""What begins a text and ends an answer: the same for a model's folder and for its file.

A checkpoint says it in up to three places: tokenizer, config.json and generation_config.json. The tokenizer
made the training text, so it is believed where they disagree; further ends, as of a chat's turns, stand in
the other two.
"""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _said_ends(model: PreTrainedModel) -> list[int]:
    """The eos tokens of config.json and generation_config.json, each once."""
    found: dict[int, None] = {}
    for config in (model.config.get_text_config(), model.generation_config):
        said = getattr(config, "eos_token_id", None)
        found |= dict.fromkeys([said] if isinstance(said, int) else said or [])
    return list(found)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, the tokenizer's eos first.

    If config.json and generation_config.json have others only, the tokenizer's is the only one.
    """
    said, own = _said_ends(model), tokenizer.eos_token_id
    if own is None:
        return said
    return [own, *(token for token in said if token != own and own in said)]


def disagreements(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Where the configs contradict the tokenizer, in a sentence each."""
    found = []
    bos, ends = model.config.get_text_config().bos_token_id, _said_ends(model)
    if bos is not None and bos != tokenizer.bos_token_id:
        found.append(_sentence("bos_token_id", bos, tokenizer.bos_token_id))
    own = tokenizer.eos_token_id
    if ends and own is not None and own not in ends:
        found.append(_sentence("eos_token_id", ends[0] if len(ends) == 1 else ends, own))
    return found


def _sentence(field: str, said: object, taken: int | None) -> str:
    return f"{field} is {said} in config.json, but {taken} in the tokenizer, which is taken"
