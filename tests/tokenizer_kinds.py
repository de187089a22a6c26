"""Tokenizers of every kind that can be exported, trained here on a few sentences, as tokenizer.json texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from engine_models import TEXT, byte_level_tokenizer, sentencepiece_tokenizer

SENTENCES = {
    "Latin": "Füße, naïve cœurs & Ægir: don't you'll we've I'M THEY'RE it's 3.14, 1984 and 12345678!",
    "Cyrillic": "Кошка сидит на окне и смотрит, как падает снег. Ей 7 лет.",
    "Greek": "Η γάτα κοιμάται στον ήλιο, κι ο σκύλος τρέχει στην αυλή.",
    "Arabic": "القطة تنام في الشمس، والكلب يجري في الحديقة ٣ مرات.",
    "Hebrew": "הַחתול ישן בשמש, והכלב רץ בגינה.",
    "Devanagari": "बिल्ली धूप में सो रही है और कुत्ता बगीचे में दौड़ता है। १२३",
    "Tamil": "பூனை வெயிலில் தூங்குகிறது; நாய் தோட்டத்தில் ஓடுகிறது.",
    "Thai": "แมวนอนกลางแดด ส่วนหมาวิ่งในสวน ๔๕",
    "Chinese": "猫在太阳下睡觉，狗在院子里跑。一共３只。",
    "Japanese": "猫は日なたで眠り、犬は庭を走る。ｶﾞｷﾞｸﾞ「テスト」",
    "Korean": "고양이는 햇볕에서 자고 개는 마당에서 뛴다.",
    "Georgian": "კატას მზეზე სძინავს, ძაღლი კი ეზოში დარბის.",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ☺️ 1️⃣ 🙂🙃",
    "code": "def f(x):\n\treturn {'a': x**2, \"b\": [x != 0]}  # ok\r\n\r\n    if (a&&b) { i++; }\n\n\n",
    "controls": "a\x00b\x01\x1b[0m\x7f\x85\u200b\u200d\u2028\ufeff\u00ad end",
    "composed": "e\u0301 \u0041\u030a \u1e9b\u0323 ﬁ ½ ² Ⅷ ① 한 \u1112\u1161\u11ab İ ẞ ſ 'ſ Å \u212b",
}
"""Of ten scripts and more, by name."""

CORPUS = [TEXT, *SENTENCES.values()] * 3

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_bpe(
    split: Sequence[pre_tokenizers.PreTokenizer] = (),
    use_regex: bool = True,
    normalizer: normalizers.Normalizer | None = None,
    special: Sequence[str] = ("<|endoftext|>",),
) -> Tokenizer:
    """A byte-level BPE that splits as `split` says, and by GPT-2's pattern with `use_regex`."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, last])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def edited(tokenizer: Tokenizer, edit: Callable[[dict[str, Any]], object]) -> Tokenizer:
    """What becomes of a tokenizer whose tokenizer.json is changed."""
    data = json.loads(tokenizer.to_str())
    edit(data)
    return Tokenizer.from_str(json.dumps(data))


def _split(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits)), "isolated")]


def smollm() -> Tokenizer:
    return byte_level_bpe(
        [pre_tokenizers.Digits(individual_digits=True)], special=("<|endoftext|>", "<|im_start|>")
    )


def qwen2() -> Tokenizer:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = byte_level_bpe(_split(""), False, normalizers.NFC(), special)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<think>")])
    return tokenizer


def llama3() -> Tokenizer:
    """With words that the merges do not make, and its begin-of-text token in front."""
    special = ("<|begin_of_text|>", "<|end_of_text|>")
    tokenizer = byte_level_bpe(_split("{1,3}"), False, special=special)

    def change(data: dict[str, Any]) -> None:
        data["model"]["ignore_merges"] = True
        for word in ("Ġzebra", "Ã©tÃ©", "çĮ«"):  # "été" and a cat
            data["model"]["vocab"][word] = len(data["model"]["vocab"])

    tokenizer = edited(tokenizer, change)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    return tokenizer


def olmo2() -> Tokenizer:
    return byte_level_bpe(_split("{1,3}"), False)


def neox() -> Tokenizer:
    """With runs of spaces as added tokens, which are found in the normalized text."""
    tokenizer = byte_level_bpe(
        normalizer=normalizers.NFC(), special=("<|endoftext|>", "<|padding|>")
    )
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (2, 3, 4, 8)])
    return tokenizer


def normalized() -> Tokenizer:
    """Every normalizer that has a name in the file, and some more added tokens than one would want."""
    steps = [
        normalizers.Replace("--", "—"),
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Prepend("> "),
        normalizers.Replace("ss", "ß"),
    ]
    tokenizer = byte_level_bpe(normalizer=normalizers.Sequence(steps))
    tokenizer.add_tokens([AddedToken("ＡＢ", normalized=True), AddedToken("X--", normalized=False)])
    return tokenizer


def flags() -> Tokenizer:
    """Added tokens with every combination of flags."""
    tokenizer = byte_level_bpe(normalizer=normalizers.Lowercase())
    for number in range(16):
        token = AddedToken(
            f"<T{number}>" if number % 2 and number % 3 else f"t{number}",
            single_word=bool(number & 1),
            lstrip=bool(number & 2),
            rstrip=bool(number & 4),
            normalized=bool(number & 8),
        )
        (tokenizer.add_tokens if number % 3 else tokenizer.add_special_tokens)([token])
    tokenizer.add_tokens([AddedToken("word", single_word=True), AddedToken("é", single_word=True)])
    tokenizer.add_tokens([AddedToken("<T", rstrip=True), AddedToken("  <", lstrip=True)])
    return tokenizer


def gemma() -> Tokenizer:
    """No space in front; runs of spaces and line breaks are added tokens."""
    tokenizer = Tokenizer.from_str(sentencepiece_tokenizer())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "▁▁", "<unused0>")])
    tokenizer.add_special_tokens(["<start_of_turn>"])
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """Spaces are made visible by the pre-tokenizer, as in Mistral's."""
    tokenizer = edited(
        Tokenizer.from_str(sentencepiece_tokenizer()), lambda data: data.update(normalizer=None)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    return tokenizer


def holes() -> Tokenizer:
    """Ids with a hole, and added tokens behind it."""

    def change(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        data["model"]["vocab"] = {t: i if i < 600 else i + 19 for t, i in vocab.items()}
        data["added_tokens"].append(
            {**data["added_tokens"][0], "id": len(vocab) + 40, "content": "<|late|>"}
        )
        data["model"]["vocab"]["<|late|>"] = len(vocab) + 40

    return edited(smollm(), change)


def unigram(byte_fallback: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, *list(SENTENCES.values())[:6]] * 3, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )

    def change(data: dict[str, Any]) -> None:
        data["model"]["vocab"] += [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
        data["model"]["byte_fallback"] = True

    return edited(tokenizer, change) if byte_fallback else tokenizer


def few_bytes() -> Tokenizer:
    """Bytes that are missing are unknown, a run of them one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def few_byte_tokens() -> Tokenizer:
    """Characters fall back to bytes, if all of theirs are there."""

    def change(data: dict[str, Any]) -> None:
        for byte in (*range(0x20), *range(0x98, 0xB8), 0xE3, 0xF0):
            del data["model"]["vocab"][f"<0x{byte:02X}>"]

    return edited(Tokenizer.from_str(sentencepiece_tokenizer()), change)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "paper": lambda: Tokenizer.from_str(byte_level_tokenizer()),
    "gpt-2": byte_level_bpe,
    "smollm": smollm,
    "qwen2": qwen2,
    "llama-3": llama3,
    "olmo-2": olmo2,
    "gpt-neox": neox,
    "llama-2": lambda: Tokenizer.from_str(sentencepiece_tokenizer()),
    "gemma": gemma,
    "mistral": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "unigram": lambda: unigram(True),
    "unigram, unknown characters": lambda: unigram(False),
    "normalizers": normalized,
    "flags": flags,
    "holes": holes,
    "few bytes": few_bytes,
    "few byte tokens": few_byte_tokens,
}
"""By the model that is known for the kind, or what is special about it."""
