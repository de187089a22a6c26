"""Writes unicode_tables.inc, the character properties that the tokenizer needs, from unicodedata.

Run it as `python native/text/unicode_tables.py` when a newer Unicode version is wanted. Tables:
ranges of letters and numbers (the GPT-2 pre-tokenization), full compatibility decompositions,
canonical combining classes and primary composites (NFKC). Hangul syllables are left out: their
(de)composition is arithmetic.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

CODE_POINTS = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
HANGUL_SYLLABLES = range(0xAC00, 0xAC00 + 11172)


def ranges(value: Callable[[str], int]) -> list[tuple[int, int, int]]:
    """Maximal ranges [first, last] of code points of equal, non-zero value."""
    found: list[tuple[int, int, int]] = []
    for c in CODE_POINTS:
        v = value(chr(c))
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


def category_table(name: str, initial: str) -> str:
    """Ranges of the characters whose general category begins with `initial`."""
    found = ranges(lambda c: int(unicodedata.category(c).startswith(initial)))
    return array(f"constexpr CodeRange {name}[]", (f"{{{a}, {b}}}" for a, b, _ in found))


def decomposition_tables() -> str:
    """Full compatibility decompositions, in UTF-16."""
    codes: list[str] = []
    units: list[int] = []
    for c in CODE_POINTS:
        decomposed = unicodedata.normalize("NFKD", chr(c))
        if c not in HANGUL_SYLLABLES and decomposed != chr(c):
            codes.append(f"{{{c}, {len(units)}}}")
            raw = decomposed.encode("utf-16-le")
            units += [int.from_bytes(raw[i : i + 2], "little") for i in range(0, len(raw), 2)]
    codes.append(f"{{{sys.maxunicode + 1}, {len(units)}}}")
    return (
        "// The decomposition of an entry ends where the next one begins; UTF-16 code units.\n"
        + array("constexpr Decomposition kDecompositions[]", codes)
        + array("constexpr uint16_t kDecompositionUnits[]", map(str, units))
    )


def composition_table() -> str:
    """Pairs of characters and their primary composite."""
    pairs = []
    for c in CODE_POINTS:
        parts = unicodedata.decomposition(chr(c)).split()
        canonical = len(parts) == 2 and not parts[0].startswith("<")
        if canonical and unicodedata.normalize("NFC", chr(c)) == chr(c):
            pairs.append((int(parts[0], 16), int(parts[1], 16), c))
    return array(
        "constexpr Composition kCompositions[]", (f"{{{a}, {b}, {c}}}" for a, b, c in sorted(pairs))
    )


def tables() -> str:
    """The whole text of unicode_tables.inc."""
    classes = ranges(unicodedata.combining)
    return "\n".join(
        [
            f"// Written by unicode_tables.py from Unicode {unicodedata.unidata_version}.",
            "// clang-format off",
            category_table("kLetters", "L"),
            category_table("kNumbers", "N"),
            array(
                "constexpr ClassRange kCombiningClasses[]",
                (f"{{{a}, {b}, {v}}}" for a, b, v in classes),
            ),
            decomposition_tables(),
            composition_table() + "// clang-format on",
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".inc").write_text(tables(), encoding="ascii")
