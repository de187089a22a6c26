"""Cleaning, one line at a time: what stands in a corpus file becomes plain English text.

Every BabyLM source carries traces of where it came from: CHILDES its transcription codes, the
Children's Book Test its Penn Treebank tokens, subtitles their sound cues and music notes,
Wikipedia the holes its extractor left. A source is a tuple of small functions from text to text,
applied in order; a new source is one more row of `SOURCES`. Text of any other origin only has its
characters repaired and its white space collapsed.

The aim is text that looks as BLiMP and a prompt do ("don't", straight quotes, no speaker tags),
because a model is only as good as the match between what it read and what it is asked.
"""

import html
import re
from collections.abc import Callable
from pathlib import Path

Rule = Callable[[str], str]


def sub(pattern: str, replacement: str = "") -> Rule:
    """A rule that replaces every match of a regular expression."""
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(replacement, text)


# --- every text -------------------------------------------------------------------------------

# UTF-8 that was once read as Latin-1 or Windows-1252: "Tomás" as "TomÃ¡s", "it’s" as "itâ€™s".
_MISREAD = re.compile(r"[ÂÃ][\x80-\xbf]|â€[\x80-\xbf‘’“”•–—˜™š›œžŸ]")


def _reread(match: re.Match[str]) -> str:
    raw = b"".join(c.encode("latin-1" if ord(c) < 256 else "cp1252") for c in match[0])
    return raw.decode("utf-8", errors="replace")


def _repair_misread(text: str) -> str:
    return _MISREAD.sub(_reread, text)


_REPAIR: tuple[Rule, ...] = (
    _repair_misread,
    # The replacement character: an apostrophe where one must have stood ("I �m"), else nothing.
    sub(r"(?<=[A-Za-z]) ?�(?=(?:s|t|d|m|re|ve|ll)\b)", "'"),
    sub(r"�+"),
    # A lower-cased, doubly decoded music note; then control, zero-width and soft-hyphen characters.
    sub(r"â\x99a", "♪"),
    sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2060\ufeff]"),
)


def _finish(text: str) -> str:
    """White space collapsed; nothing at all where neither a letter nor a digit is left."""
    text = " ".join(text.split())
    return text if any(c.isalnum() for c in text) else ""


# --- rules that several sources share ---------------------------------------------------------

_STRAIGHT_QUOTES = (sub(r"[‘’′]", "'"), sub(r"[“”]", '"'))
_ATTACH_PUNCTUATION = (sub(r"\s+([.,;:!?](?!\w))", r"\1"),)
_NO_LEADING_PUNCTUATION = (sub(r"^[\s.,;:!?]+"),)
_ORNAMENTS = (sub(r"(?:\* *){2,}", " "), sub(r"\+?-{6,}\+?", " "), sub(r"\|", " "))


def _mostly_ascii(text: str) -> str:
    """Nothing where more than a quarter of the letters are not ASCII: another script, or garbage."""
    letters = [c for c in text if c.isalpha()]
    return text if sum(not c.isascii() for c in letters) * 4 <= len(letters) else ""


# --- the sources ------------------------------------------------------------------------------

_AOCHILDES = (*_ATTACH_PUNCTUATION, sub(r"\bi\b", "I"))

_CHILDES = (
    sub(r"\*[A-Za-z0-9]+:\s*", " "),  # the speaker
    sub(r"\s*= = =.*$"),  # the next transcript's file name
    sub(r"\s*%[a-z]+:.*$"),  # dependent tiers: addressee, intonation
    sub(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]+"),  # comments and paralinguistic notes
    sub(r"\(=[^)]*\)"),
    sub(r"↫[^↫]*↫"),  # a stuttered onset
    sub(r"[\[\]()⌈⌉⌊⌋]"),  # overlaps; "wha(t's)" is the full form
    sub(r"\b(?:xxx|yyy|www)\b"),  # unintelligible, phonetic only, not transcribed
    sub(r"''", "'"),
    sub(r"(?<=\w)[+_](?=\w)", " "),
    *_ATTACH_PUNCTUATION,
    *_NO_LEADING_PUNCTUATION,
)

_SWITCHBOARD = (
    sub(r"^[AB]: ?"),  # the speaker
    sub(r"\s*\*.*$"),  # the transcribers' remarks
    *_ATTACH_PUNCTUATION,
)

_BNC_SPOKEN = (
    sub(r",(?=[A-Za-z])", ", "),
    *_ATTACH_PUNCTUATION,
    # Words left out for anonymity leave their punctuation behind: "there. .", "going,?", ",,"
    sub(r",+([,.!?])", r"\1"),
    sub(r"([.!?])(?:\s*[.,])+", r"\1"),
    *_NO_LEADING_PUNCTUATION,
)

_CBT = (
    sub(r"^_BOOK_TITLE_.*$"),
    sub(r"-LSB- Illustration\b.*?(?:-RSB-|$)"),
    *_ORNAMENTS,
    sub(r"-LRB- ?", "("),
    sub(r" ?-RRB-", ")"),
    sub(r"-LSB- ?", "["),
    sub(r" ?-RSB-", "]"),
    sub(r"`` ?", '"'),
    sub(r" ?''", '"'),
    sub(r"` ?", "'"),
    sub(r"(^|[:(] |-- )' ", r"\1'"),
    sub(r" '(?= |$)", "'"),
    sub(r"(?<=\w) (n't|'(?:s|re|ve|ll|d|m|t))\b", r"\1"),
    sub(r"('[Tt]) (?=(?:is|was|were|will)\b)", r"\1"),
    sub(r"\b([Gg]on|[Ww]an) na\b", r"\1na"),
    sub(r"\b([Gg]ot) ta\b", r"\1ta"),
    sub(r"\b([Cc]an) not\b", r"\1not"),
    *_ATTACH_PUNCTUATION,
)

_BOOKS = (
    sub(r"^.*(?:https?://|pgdp\.net|Project Gutenberg|Transcriber's [Nn]ote).*$"),
    sub(r"\[oe\]", "oe"),
    sub(r"\[(?:\d+|(?:Illustration|Footnote|Sidenote|See)\b[^\]]*)(?:\]|$)"),
    sub(r"\{[ivxlc]+\}"),  # page numbers
    sub(r"^\d+\*? (?=[A-Z])"),  # the number of a story, before its title
    sub(r"_|= = =", ""),  # emphasis; the border of a title
    *_ORNAMENTS,
)

_SUBTITLES = (
    html.unescape,
    sub(r"^.*(?:[Ss]ubtitle[sd]?:? (?:by|brought)|www\.|https?://).*$"),
    sub(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)", " "),  # typesetting, sound cues
    sub(r"[][(){}♪♫¶*~]|#(?!\d)", " "),
    sub(r"^\s*[A-Z][A-Z .']+:\s*"),  # the speaker
    # Dashes mark a change of speaker within one subtitle.
    sub(r"^\s*[-–—]+\s*"),
    sub(r"([.?!\"]) [-–—]+ ?(?=[\w\"'])", r"\1 "),
    # Characters that optical recognition took for others: "we'II", "l'm", "l-l was".
    sub(r"'II\b", "'ll"),
    sub(r"\bl(?='(?:m|ll|ve|d)\b)|(?<![\w'-])l(?![\w'-])", "I"),
    sub(r"\bl-l\b", "I-I"),
    *_ATTACH_PUNCTUATION,
    _mostly_ascii,
)

_WIKIPEDIA = (
    html.unescape,
    sub(r"<ref\b.*?(?:</ref>|/>|$)|</?[a-z][^<>]*>", " "),
    sub(r"\S*\|\|\S*"),  # rows of tables
    sub(r"\b(?:formula|codice)_\d+"),  # where the extractor dropped a formula
    sub(r"= ?= ?=?"),  # headings
    # What is left of names in other scripts: "(; 12 July 1651", "("")", "( , )".
    sub(r'"[\s,;]*"'),
    sub(r"\(\s*[,;:/\s]+", "("),
    sub(r"[,;/\s]+\)", ")"),
    sub(r"\(\s*\)"),
    *_ATTACH_PUNCTUATION,
)

SOURCES: dict[str, tuple[Rule, ...]] = {
    "aochildes": _AOCHILDES,
    "bnc_spoken": _BNC_SPOKEN,
    "cbt": _CBT,
    "childes": _CHILDES,
    "children_stories": _BOOKS,
    "gutenberg": _BOOKS,
    "open_subtitles": _SUBTITLES,
    "qed": _SUBTITLES,
    "simple_wiki": _WIKIPEDIA,
    "switchboard": _SWITCHBOARD,
    "switchboard_2023": _SWITCHBOARD,
    "wikipedia": _WIKIPEDIA,
}


def source_of(file: Path) -> str | None:
    """The BabyLM source that a file's name stands for ("childes.train" -> "childes"), if any."""
    stem = file.name.split(".")[0].lower()
    return stem if stem in SOURCES else None


def clean(line: str, source: str | None = None) -> str:
    """One line of a corpus file as plain text, or "" where nothing worth reading is left.

    Args:
        line: the line as it stands in the file.
        source: a key of `SOURCES`; None for text of any other origin.
    """
    before = None
    while line != before:  # what one repair takes out may have hidden what another one mends
        before = line
        for repair in _REPAIR:
            line = repair(line)
    rules = () if source is None else (*_STRAIGHT_QUOTES, *SOURCES[source])
    for rule in rules:
        line = rule(line)
    return _finish(line)
