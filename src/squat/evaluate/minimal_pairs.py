"""Minimal pairs: does the model find the grammatical sentence of a pair more probable?

A paradigm is a file of pairs that differ in one phenomenon; a folder of them is a benchmark: BLiMP
(Warstadt et al. 2020; 67 paradigms, grouped into the 12 fields of Squat's Table I by their
`linguistics_term`), the BLiMP supplement of BabyLM (tasks without a term, each of which stands for
itself), or the pairs of the built-in grammar. A field's accuracy is the mean over its paradigms.

Scores equal lm-evaluation-harness's `blimp` tasks (read off version 0.4.13): the two sentences are
two choices after an empty context, each joined to it by the target delimiter, **a space**; the
space counts for tokenizers that do not add one themselves. The answer is the first maximum of the
summed log-probabilities, not normalised by length, and the grammatical sentence comes first, so **a
tie counts as right**. (BLiMP holds seven pairs of two equal sentences.) How many pairs tied is
reported: a model that finds everything equally probable would look better than chance.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from squat.errors import CheckpointError, DataError, EngineError
from squat.evaluate.scorer import LogitsModel, Scorer
from squat.terminal import track
from squat.unicode import broken_character

# lm-eval's target delimiter, which joins a choice to the (empty) context
_DELIMITER = " "

# linguistics_term -> field, in the order of the paper's Table I
_FIELDS = {
    "anaphor_agreement": "anaphor agreement (AA)",
    "argument_structure": "argument structure (AS)",
    "s-selection": "argument structure (AS)",
    "binding": "binding",
    "control_raising": "control/raising",
    "determiner_noun_agreement": "determiner-noun agreement",
    "ellipsis": "ellipsis",
    "filler_gap_dependency": "filler-gap",
    "irregular_forms": "irregular forms",
    "island_effects": "island effects",
    "npi_licensing": "NPI licensing",
    "quantifiers": "quantifiers",
    "subject_verb_agreement": "subject-verb agreement",
}


@dataclass(frozen=True)
class Paradigm:
    """One file: its name, its field (None for a task of the supplement), its pairs (good, bad)."""

    name: str
    field: str | None
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ParadigmResult:
    """How many of a paradigm's pairs came out right; `ties` of those only by being equal."""

    name: str
    field: str | None
    pairs: int
    correct: int
    ties: int

    @property
    def accuracy(self) -> float:
        """Share of pairs that came out right, 0 to 1."""
        return self.correct / self.pairs


@dataclass(frozen=True)
class MinimalPairsResult:
    """Accuracies (0 to 1) by paradigm, by field and on average."""

    paradigms: tuple[ParadigmResult, ...]

    @property
    def fields(self) -> dict[str, float]:
        """Field -> mean accuracy over its paradigms: the paper's fields first, in its order."""
        found = dict.fromkeys(p.field for p in self.paradigms if p.field is not None)
        known = [field for field in dict.fromkeys(_FIELDS.values()) if field in found]
        return {
            field: fmean(p.accuracy for p in self.paradigms if p.field == field)
            for field in dict.fromkeys([*known, *found])
        }

    @property
    def supplement(self) -> dict[str, float]:
        """Task -> accuracy, for the paradigms that belong to no field."""
        return {p.name: p.accuracy for p in self.paradigms if p.field is None}

    @property
    def average_fields(self) -> float | None:
        """Mean over the fields (the paper's "BLiMP" average); None without any."""
        return _mean(self.fields.values())

    @property
    def average_with_supplement(self) -> float | None:
        """Mean over fields and supplement tasks, each counting once; None without a supplement."""
        supplement = self.supplement.values()
        return _mean([*self.fields.values(), *supplement]) if supplement else None

    @property
    def average_paradigms(self) -> float | None:
        """Mean over the paradigms that belong to a field (BLiMP's own); None without any."""
        return _mean(p.accuracy for p in self.paradigms if p.field is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "average_fields": self.average_fields,
            "average_with_supplement": self.average_with_supplement,
            "average_paradigms": self.average_paradigms,
            "fields": self.fields,
            "supplement": self.supplement,
            "paradigms": {
                p.name: {
                    "field": p.field,
                    "accuracy": p.accuracy,
                    "pairs": p.pairs,
                    "ties": p.ties,
                }
                for p in self.paradigms
            },
        }


def read_minimal_pairs(*folders: str | Path, limit: int | None = None) -> list[Paradigm]:
    """Read every `*.jsonl` of the folders, one paradigm a file, in the order of their names.

    A line is an object with `sentence_good` and `sentence_bad`; `linguistics_term`, where present,
    names the field. Other keys are ignored.

    Args:
        folders: BLiMP, its supplement, or both.
        limit: the first so many pairs of each paradigm; None for all.

    Raises:
        DataError: a folder without such files, a file without pairs, a line that is no pair, two
            files of the same name, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit}: not a number of pairs; give 1 or more, or none for all")
    paradigms: dict[str, Paradigm] = {}
    for folder in folders:
        files = sorted(Path(folder).glob("*.jsonl"))
        if not files:
            raise DataError(
                f"{folder}: no folder with *.jsonl files; give the folder that holds the minimal "
                "pairs, one file a paradigm"
            )
        for file in files:
            if file.stem in paradigms:
                raise DataError(f"{file}: a second paradigm of this name; rename or drop one")
            paradigms[file.stem] = _read_paradigm(file, limit)
    return list(paradigms.values())


def _read_paradigm(file: Path, limit: int | None) -> Paradigm:
    pairs: list[tuple[str, str]] = []
    term = None
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(pairs) == limit:
                    break
                if line.strip():
                    where = f"{file}, line {number}"
                    good, bad, line_term = _read_line(line, where)
                    if pairs and line_term != term:
                        raise DataError(
                            f"{where}: 'linguistics_term' is {line_term!r} after {term!r}; put "
                            "each paradigm in a file of its own"
                        )
                    pairs.append((good, bad))
                    term = line_term
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: not readable as UTF-8 text ({error}); replace the file"
        ) from error
    if not pairs:
        raise DataError(f"{file}: holds no pair; fill it or move it out of the folder")
    field = None if term is None else _FIELDS.get(term, term.replace("_", " "))
    return Paradigm(file.stem, field, tuple(pairs))


def _read_line(line: str, where: str) -> tuple[str, str, str | None]:
    """The two sentences and the linguistics_term of one line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); correct or delete the line"
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__}, not an object with 'sentence_good' and "
            "'sentence_bad'; correct or delete the line"
        )
    for key in ("sentence_good", "sentence_bad"):
        sentence = record.get(key)
        if not isinstance(sentence, str) or not sentence.strip():
            found = f"is {json.dumps(sentence)}" if key in record else "is missing"
            raise DataError(f"{where}: '{key}' {found}; give it a sentence or delete the line")
        if problem := broken_character(sentence):
            raise DataError(f"{where}: '{key}': {problem}")
    term = record.get("linguistics_term")
    if term is not None and not isinstance(term, str):
        raise DataError(f"{where}: 'linguistics_term' is {json.dumps(term)}; give it a name")
    return record["sentence_good"], record["sentence_bad"], term


def evaluate_minimal_pairs(scorer: Scorer, paradigms: Sequence[Paradigm]) -> MinimalPairsResult:
    """Score every sentence and count the pairs whose grammatical one is at least as probable.

    All sentences of all paradigms go to the scorer in one call, which can then sort them by length.

    Raises:
        CheckpointError: a log-probability that is not a number.
    """
    # each sentence once: two equal ones then tie exactly, whatever batches they would fall into
    texts = list(dict.fromkeys(_DELIMITER + s for p in paradigms for pair in p.pairs for s in pair))
    scores = dict(zip(texts, _scores(scorer, texts), strict=True))
    for text, score in scores.items():
        if math.isnan(score):
            raise CheckpointError(
                f"the log-probability of {text!r} is {score}: the model computes no numbers; "
                "check its weights and step sizes"
            )
    results = []
    for paradigm in paradigms:
        pairs = [(scores[_DELIMITER + a], scores[_DELIMITER + b]) for a, b in paradigm.pairs]
        results.append(
            ParadigmResult(
                name=paradigm.name,
                field=paradigm.field,
                pairs=len(pairs),
                correct=sum(good >= bad for good, bad in pairs),
                ties=sum(good == bad for good, bad in pairs),
            )
        )
    return MinimalPairsResult(tuple(results))


def _scores(scorer: Scorer, texts: Sequence[str]) -> list[float]:
    """The engine's, one text after the other, since it does not say how far it is; others sort by length.

    Those that begin alike follow each other: it computes what they have in common once.
    """
    if not isinstance(scorer, LogitsModel):
        return scorer.score(texts)
    scores: dict[str, float] = {}
    with track(sorted(texts), "Scoring texts") as each:
        for text in each:
            try:
                (scores[text],) = scorer.score([text])
            except EngineError as error:
                cause = str(error).removeprefix("texts: element 0: ")
                raise EngineError(f"{text!r:.60}: {cause}") from None
    return [scores[text] for text in texts]


def minimal_pairs_table(results: Mapping[str, MinimalPairsResult]) -> Table:
    """Accuracy in percent: one column a model, one row a field, a supplement task, an average."""
    table = Table(title="Minimal pairs: accuracy in %")
    table.add_column("field")
    for name in results:
        table.add_column(name, justify="right")

    def add(label: str, values: Sequence[float | None]) -> None:
        if any(value is not None for value in values):
            table.add_row(label, *("" if v is None else f"{100 * v:.1f}" for v in values))

    each = list(results.values())
    for part in ("fields", "supplement"):
        columns: list[dict[str, float]] = [getattr(result, part) for result in each]
        for label in dict.fromkeys(label for column in columns for label in column):
            add(label, [column.get(label) for column in columns])
        table.add_section()
    add("average of fields", [result.average_fields for result in each])
    add("average with supplement", [result.average_with_supplement for result in each])
    add("average of paradigms", [result.average_paradigms for result in each])
    table.add_row("pairs", *(f"{sum(p.pairs for p in r.paradigms):,}" for r in each))
    table.add_row("of them ties", *(f"{sum(p.ties for p in r.paradigms):,}" for r in each))
    return table


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return fmean(collected) if collected else None
