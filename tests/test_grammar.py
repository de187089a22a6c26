"""The built-in corpus: deterministic text, held-out pairs, nothing that counting words solves."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from squat.data import corpus_files, generate_text, minimal_pairs, read_corpus, write_corpus
from squat.data.grammar import CONTRASTS, PLAIN, STORIES, Pair, finish
from squat.data.lexicon import (
    ANIMALS,
    FEMALE,
    FOOD,
    LOOKS,
    MALE,
    PEOPLE,
    THINGS,
    TRAITS,
    _noun,
    _verb,
)

# The twelve fields of the paper's Table I.
TERMS = {
    "anaphor_agreement",
    "argument_structure",
    "binding",
    "control_raising",
    "determiner_noun_agreement",
    "ellipsis",
    "filler_gap_dependency",
    "irregular_forms",
    "island_effects",
    "npi_licensing",
    "quantifiers",
    "subject_verb_agreement",
}


@pytest.fixture(scope="module")
def text() -> list[str]:
    return list(generate_text(20_000, seed=0))


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Pair]]:
    return minimal_pairs(100, seed=0)


def words(sentence: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", sentence)


def test_the_same_seed_gives_the_same_text(text: list[str]) -> None:
    again = list(generate_text(20_000, seed=0))
    assert again == text
    assert list(generate_text(100, seed=1)) != list(generate_text(100, seed=0))


def test_the_number_of_sentences_is_what_was_asked_for(text: list[str]) -> None:
    assert sum(len(re.findall(r"[.?](?= |$)", line)) for line in text) == 20_000


def test_lines_are_sentences(text: list[str]) -> None:
    for line in text:
        assert re.fullmatch(r"([A-Z][a-zA-Z ,]*[.?])( [A-Z][a-zA-Z ,]*[.?])*", line), line
        assert "  " not in line
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", line.lower()), line


def test_text_is_varied(text: list[str]) -> None:
    vocabulary = Counter(word for line in text for word in words(line))
    assert len(vocabulary) > 600
    assert len(set(text)) > 0.98 * len(text)


def test_pairs_have_blimps_keys_and_terms(pairs: dict[str, list[Pair]]) -> None:
    assert {pair["linguistics_term"] for rows in pairs.values() for pair in rows} == TERMS
    for uid, rows in pairs.items():
        assert len({row["sentence_good"] for row in rows}) == len(rows) == 100
        for row in rows:
            assert set(row) == {
                "sentence_good",
                "sentence_bad",
                "field",
                "linguistics_term",
                "UID",
            }
            assert row["UID"] == uid
            assert row["sentence_good"] != row["sentence_bad"]
            assert row["field"] in ("morphology", "syntax", "semantics", "syntax_semantics")


@pytest.mark.parametrize("seed", [0, 1])
def test_no_sentence_of_a_pair_occurs_in_the_text(text: list[str], seed: int) -> None:
    whole = "\n".join(text)
    for rows in minimal_pairs(60, seed).values():
        for row in rows:
            assert row["sentence_good"] not in whole
            assert row["sentence_bad"] not in whole


def test_words_of_the_pairs_are_in_the_text(text: list[str], pairs: dict[str, list[Pair]]) -> None:
    known = {word.lower() for line in text for word in words(line)}
    for rows in pairs.values():
        for row in rows:
            assert {w.lower() for w in words(row["sentence_good"] + row["sentence_bad"])} <= known


def test_counting_words_is_no_help(text: list[str], pairs: dict[str, list[Pair]]) -> None:
    counts = Counter(word.lower() for line in text for word in words(line))

    def score(sentence: str) -> float:
        return math.fsum(math.log(counts[word.lower()] + 1) for word in words(sentence))

    for uid, rows in minimal_pairs(400, seed=0).items():
        margins = [score(row["sentence_good"]) - score(row["sentence_bad"]) for row in rows]
        ties = sum(abs(margin) < 1e-9 for margin in margins)
        accuracy = (sum(margin > 1e-9 for margin in margins) + ties / 2) / len(rows)
        assert 0.4 < accuracy < 0.6, (uid, accuracy)


def test_length_is_no_help(pairs: dict[str, list[Pair]]) -> None:
    for uid, rows in pairs.items():
        for row in rows:
            good, bad = words(row["sentence_good"]), words(row["sentence_bad"])
            assert len(good) == len(bad), (uid, row)


def test_every_construction_can_be_drawn_without_end() -> None:
    # A construction that runs out of sentences would hang minimal_pairs.
    assert all(len(rows) == 1000 for rows in minimal_pairs(1000, seed=3).values())
    assert len(CONTRASTS) >= 12
    assert PLAIN
    assert STORIES


def test_determiners_and_nouns_agree_in_the_text(text: list[str]) -> None:
    nouns = MALE + FEMALE + PEOPLE + ANIMALS + THINGS + FOOD
    adjectives = rf"(?:(?:{'|'.join(TRAITS + LOOKS)}) )*"
    singulars, plurals = ("|".join(forms) for forms in zip(*nouns, strict=True))
    wrong = re.compile(
        rf"\b(?:this|a|an|every|one) {adjectives}(?:{plurals})\b"
        rf"|\b(?:these|those|many|some|two|three|five|ten) {adjectives}(?:{singulars})\b"
    )
    assert not [line for line in text if wrong.search(line.lower())]
    right = re.compile(rf"\bthese {adjectives}(?:{plurals})\b")
    assert any(right.search(line) for line in text)


def test_finish() -> None:
    assert finish("a old man saw a egg") == "An old man saw an egg."
    assert finish("who did Tom see?") == "Who did Tom see?"


def test_morphology() -> None:
    assert _noun("lady") == ("lady", "ladies")
    assert _noun("boy") == ("boy", "boys")
    assert _noun("brush") == ("brush", "brushes")
    assert _noun("mouse/mice")[True] == "mice"
    assert _verb("carry") == ("carry", "carries", "carried", "carried", "carrying")
    assert _verb("drop+") == ("drop", "drops", "dropped", "dropped", "dropping")
    assert _verb("praise") == ("praise", "praises", "praised", "praised", "praising")
    assert _verb("see/saw/seen") == ("see", "sees", "saw", "seen", "seeing")
    assert _verb("swim+/swam/swum") == ("swim", "swims", "swam", "swum", "swimming")


def test_a_written_corpus_is_a_corpus_like_any_other(tmp_path: Path) -> None:
    write_corpus(tmp_path, sentences=400, seed=5)
    assert [file.name for file in corpus_files(tmp_path / "train")] == ["grammar.train"]
    assert list(read_corpus(tmp_path / "train")) == list(generate_text(400, seed=5))
    dev = list(read_corpus(tmp_path / "dev"))
    assert dev
    assert dev != list(read_corpus(tmp_path / "train"))[: len(dev)]
    files = sorted((tmp_path / "pairs").iterdir())
    assert [file.stem for file in files] == sorted(CONTRASTS)
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 200
        assert {row["UID"] for row in rows} == {file.stem}
