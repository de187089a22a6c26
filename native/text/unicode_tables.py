"""Writes unicode_tables.inc, the character properties that the tokenizer needs.

Run it as `python native/text/unicode_tables.py` when the tokenizers library knows a newer Unicode. The parts
of that library know Unicode versions of different years, and the C++ tokenizer has to give the same tokens:
so the tables hold what the library answers when it is asked about every character. Tables:
ranges of letters and numbers (\\p{L} and \\p{N} of patterns), numerals (what splitting digits splits), word
characters (\\w), lower case, full canonical and compatibility decompositions, canonical combining classes and
primary composites. Hangul syllables are left out: their (de)composition is arithmetic.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

CODE_POINTS = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
HANGUL_SYLLABLES = range(0xAC00, 0xAC00 + 11172)
BELOW, IOTA = "\u0334", "\u0345"
"""Combining marks of the classes 1 and 240, the lowest and the highest."""


def ranges(value: Callable[[int], int]) -> list[tuple[int, int, int]]:
    """Maximal ranges [first, last] of code points of equal, non-zero value."""
    found: list[tuple[int, int, int]] = []
    for c in CODE_POINTS:
        v = value(c)
        if v == 0:
            continue
        if found and found[-1][1] == c - 1 and found[-1][2] == v:
            found[-1] = (found[-1][0], c, v)
        else:
            found.append((c, c, v))
    return found


def array(declaration: str, items: Iterable[str]) -> str:
    """A C++ array with its items wrapped to 100 columns."""
    lines, line = [f"{declaration} = {{"], "   "
    for item in items:
        if len(line) + len(item) + 2 > 100:
            lines.append(line)
            line = "   "
        line += f" {item},"
    return "\n".join([*lines, line, "};"]) + "\n"


def range_table(name: str, characters: set[int]) -> str:
    """Ranges of the characters of a class."""
    found = ranges(lambda c: int(c in characters))
    return array(f"constexpr CodeRange {name}[]", (f"{{{a}, {b}}}" for a, b, _ in found))


def matched(pattern: str) -> set[int]:
    """The characters that a regular expression of the library matches."""
    left = pre_tokenizers.Split(Regex(pattern), "removed")
    text = "".join(map(chr, CODE_POINTS))
    others = "".join(piece for piece, _ in left.pre_tokenize_str(text))
    return set(CODE_POINTS) - set(map(ord, others))


def numerals() -> set[int]:
    """The characters that are split off as digits."""
    split = pre_tokenizers.Digits(individual_digits=True)
    text = "".join(f"ab{chr(c)}" for c in CODE_POINTS)
    return {ord(piece) for piece, _ in split.pre_tokenize_str(text) if len(piece) == 1}


def word_characters() -> set[int]:
    """The characters next to which an added token is no single word."""
    tokenizer = Tokenizer(models.BPE({"?": 0}, [], unk_token="?"))
    tokenizer.add_tokens([AddedToken("zz", single_word=True)])
    found = tokenizer.token_to_id("zz")
    return {c for c in CODE_POINTS if found not in tokenizer.encode(f"{chr(c)}zz").ids}


def lowercase_table() -> str:
    """Characters and their lower case, of one or two characters."""
    lower = normalizers.Lowercase()
    entries = []
    for c in CODE_POINTS:
        text = lower.normalize_str(chr(c))
        if text != chr(c):
            first, second = [*map(ord, text), 0][:2]
            entries.append(f"{{{c}, {first}, {second}}}")
    return array("constexpr LowerCase kLowerCase[]", entries)


def decomposition_tables(name: str, normalizer: normalizers.Normalizer) -> str:
    """Full decompositions, in UTF-16."""
    codes: list[str] = []
    units: list[int] = []
    for c in CODE_POINTS:
        decomposed = normalizer.normalize_str(chr(c))
        if c not in HANGUL_SYLLABLES and decomposed != chr(c):
            codes.append(f"{{{c}, {len(units)}}}")
            raw = decomposed.encode("utf-16-le")
            units += [int.from_bytes(raw[i : i + 2], "little") for i in range(0, len(raw), 2)]
    codes.append(f"{{{sys.maxunicode + 1}, {len(units)}}}")
    return (
        "// The decomposition of an entry ends where the next one begins; UTF-16 code units.\n"
        + array(f"constexpr Decomposition k{name}Decompositions[]", codes)
        + array(f"constexpr uint16_t k{name}Units[]", map(str, units))
    )


def combining_class(c: int) -> int:
    """The canonical combining class, 0 if the library does not reorder the character."""
    order, character = normalizers.NFD(), chr(c)
    reordered = (
        order.normalize_str(character + BELOW) == BELOW + character
        or order.normalize_str(IOTA + character) == character + IOTA
    )
    return unicodedata.combining(character) if reordered or character in (BELOW, IOTA) else 0


def composition_table() -> str:
    """Pairs of characters and their primary composite."""
    compose = normalizers.NFC()
    pairs = []
    for c in CODE_POINTS:
        parts = unicodedata.decomposition(chr(c)).split()
        if len(parts) != 2 or parts[0].startswith("<"):
            continue
        first, second = (int(part, 16) for part in parts)
        if compose.normalize_str(chr(first) + chr(second)) == chr(c):
            pairs.append((first, second, c))
    return array(
        "constexpr Composition kCompositions[]", (f"{{{a}, {b}, {c}}}" for a, b, c in sorted(pairs))
    )


def tables() -> str:
    """The whole text of unicode_tables.inc."""
    return "\n".join(
        [
            f"// Written by unicode_tables.py from tokenizers {tokenizers.__version__}.",
            "// clang-format off",
            range_table("kLetters", matched(r"\p{L}")),
            range_table("kNumbers", matched(r"\p{N}")),
            range_table("kNumerals", numerals()),
            range_table("kWordCharacters", word_characters()),
            lowercase_table(),
            array(
                "constexpr ClassRange kCombiningClasses[]",
                (f"{{{a}, {b}, {v}}}" for a, b, v in ranges(combining_class)),
            ),
            decomposition_tables("Canonical", normalizers.NFD()),
            decomposition_tables("Compatibility", normalizers.NFKD()),
            composition_table() + "// clang-format on",
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".inc").write_text(tables(), encoding="ascii")
