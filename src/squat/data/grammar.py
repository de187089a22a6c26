"""The built-in corpus: a small grammar of English that writes text and tests what was learned.

A construction is one function. Given a `Draw` (a source of random words and phrases) it returns a
grammatical sentence, and a *contrast* also returns the same sentence with one thing wrong. Text is
made of the good sentences, of constructions that only serve the text, and of short stories; minimal
pairs, in BLiMP's format and under its twelve terms, are made of the contrasts. To add a construction,
write a function and decorate it: text, pairs and files follow.

Two properties hold by construction:

* **Held out.** A hash of the sentence decides whether it belongs to the pairs or to the text, so no
  good sentence of a pair ever occurs in the text (`held_out`).
* **Frequencies don't help.** Either good and bad have the same words in another order, or every
  contrast comes in two mirrored halves (singular and plural, he and she, with and without a gap), so
  that what is good in one half is bad in the other. Counting words gives 50 %.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypedDict, TypeVar

from squat.data.files import writing
from squat.data.lexicon import (
    ANIMALS,
    BREAK,
    EAT,
    FEMALE,
    FOOD,
    GIVE,
    HABITS,
    HURT,
    KNOW,
    LOOKS,
    MALE,
    MEN,
    NEAR,
    PEOPLE,
    PLACES,
    RAISING,
    SEE,
    SLEEP,
    TAKE,
    THINGS,
    THINK,
    TIMES,
    TOUGH,
    TRAITS,
    WOMEN,
    Noun,
    Verb,
)

T = TypeVar("T")
W = TypeVar("W", "Contrast", "Plain")
Forms = tuple[str, str]
"""The same phrase with a singular and with a plural subject: `forms[plural]`."""


class Pair(TypedDict):
    """A minimal pair with the keys that BLiMP's files have."""

    sentence_good: str
    sentence_bad: str
    field: str
    linguistics_term: str
    UID: str


# --- phrases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NounPhrase:
    """A noun phrase and what agrees with it; gender is "m", "f", "n" or "" (a person, unknown)."""

    text: str
    plural: bool
    gender: str

    def __str__(self) -> str:
        return self.text

    @property
    def pronouns(self) -> tuple[str, ...]:
        """Subject, object, owner, reflexive; nothing for one person of unknown gender."""
        return PRONOUNS["pl" if self.plural else self.gender]

    @property
    def they(self) -> str:
        """The pronoun that takes its place as a subject."""
        return self.pronouns[0]

    @property
    def them(self) -> str:
        """The pronoun that takes its place as an object."""
        return self.pronouns[1]

    @property
    def their(self) -> str:
        """The pronoun that takes its place as an owner."""
        return self.pronouns[2]

    @property
    def reflexive(self) -> str:
        """The pronoun that it binds in its own clause."""
        return self.pronouns[3]


PRONOUNS: dict[str, tuple[str, ...]] = {
    "m": ("he", "him", "his", "himself"),
    "f": ("she", "her", "her", "herself"),
    "n": ("it", "it", "its", "itself"),
    "pl": ("they", "them", "their", "themselves"),
    "": (),
}
REFLEXIVES = {gender: forms[3] for gender, forms in PRONOUNS.items() if forms}
GENDERED = {"m": (MEN, MALE), "f": (WOMEN, FEMALE)}
TITLES = {"m": ("Mister ", "King ", "Uncle "), "f": ("Miss ", "Queen ", "Aunt ")}
DETERMINERS = (
    ("the", "the", "the", "this", "a", "every"),
    ("the", "the", "the", "these", "those", "some", "many", "two"),
)
BE, WAS, HAVE, DO = ("is", "are"), ("was", "were"), ("has", "have"), ("does", "do")


class Draw:
    """Random words and phrases; `mirror` says which half of a contrast is asked for."""

    def __init__(self, random: Random, mirror: bool) -> None:
        self.random = random
        self.mirror = mirror

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each equally likely."""
        return options[int(self.random.random() * len(options))]

    def weighted(self, options: Sequence[W]) -> W:
        """One of the options, by their weights."""
        return self.random.choices(options, [option.weight for option in options])[0]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random.random() < probability

    def noun(
        self,
        noun: Noun,
        plural: bool,
        gender: str,
        adjectives: tuple[str, ...],
        determiner: str = "",
    ) -> NounPhrase:
        """Determiner, now and then an adjective, noun."""
        words = [determiner or self.pick(DETERMINERS[plural])]
        if self.chance(0.25):
            words.append(self.pick(adjectives))
        return NounPhrase(" ".join([*words, noun[plural]]), plural, gender)

    def name(self, gender: str = "") -> NounPhrase:
        """A first name, now and then with a title."""
        gender = gender or self.pick(("m", "f"))
        title = self.pick(TITLES[gender]) if self.chance(0.2) else ""
        return NounPhrase(title + self.pick(GENDERED[gender][0]), False, gender)

    def gendered(self, gender: str = "") -> NounPhrase:
        """One man or one woman, by name or not."""
        gender = gender or self.pick(("m", "f"))
        if self.chance(0.4):
            return self.name(gender)
        return self.noun(self.pick(GENDERED[gender][1]), False, gender, TRAITS, "the")

    def someone(self, plural: bool, determiner: str = "") -> NounPhrase:
        """A person or animal, or several; never a name."""
        gender = self.pick(("m", "f", "", "n"))
        nouns = {"m": MALE, "f": FEMALE, "": PEOPLE, "n": ANIMALS}[gender]
        return self.noun(self.pick(nouns), plural, gender, TRAITS, determiner)

    def anyone(self) -> NounPhrase:
        """A name, a person, an animal, one or several."""
        return self.name() if self.chance(0.35) else self.someone(self.chance(0.5))

    def human(self, plural: bool, determiner: str = "the") -> NounPhrase:
        """A person or several; never a name."""
        nouns = self.pick((MALE, FEMALE, PEOPLE))
        return self.noun(self.pick(nouns), plural, "", TRAITS, determiner)

    def thing(self, plural: bool | None = None, determiner: str = "") -> NounPhrase:
        """A thing or several."""
        plural = self.chance(0.5) if plural is None else plural
        return self.noun(self.pick(THINGS), plural, "n", LOOKS, determiner)

    def food(self) -> NounPhrase:
        """Something to eat."""
        return self.noun(self.pick(FOOD), self.chance(0.5), "n", LOOKS)

    def place(self) -> str:
        """A prepositional phrase of place."""
        return f"{self.pick(('in', 'near', 'behind'))} the {self.pick(PLACES)}"

    def relative(self, plural: bool, inner: NounPhrase) -> str:
        """A relative clause on a head of the given number, about `inner`: subject or object gap."""
        verb = self.pick(SEE)
        who = self.pick(("who", "that"))
        if self.chance(0.5):
            return f"{who} {self.tensed(verb)[plural]} {inner}"
        return f"{who} {inner} {self.tensed(verb)[inner.plural]}"

    def tensed(self, verb: Verb) -> Forms:
        """A finite verb, in any tense."""
        return self.pick(
            (
                (verb.past, verb.past),
                (verb.past, verb.past),
                verb.present,
                (f"has {verb.participle}", f"have {verb.participle}"),
                (f"will {verb.base}", f"will {verb.base}"),
            )
        )

    def predicate(self) -> Forms:
        """A verb phrase that shows the number of its subject."""
        kind = self.random.random()
        if kind < 0.25:
            tail = self.pick(HABITS) if self.chance(0.5) else self.place()
            return agreeing(self.pick(SLEEP).present, tail if self.chance(0.5) else "")
        if kind < 0.45:
            return agreeing(self.pick(SEE).present, str(self.anyone()))
        if kind < 0.6:
            return agreeing(self.pick(TAKE).present, str(self.thing()))
        if kind < 0.75:
            return agreeing(self.pick((BE, WAS)), self.pick(TRAITS))
        if kind < 0.9:
            return agreeing(self.pick((BE, WAS)), f"{self.pick(SLEEP).gerund} {self.place()}")
        return agreeing(HAVE, f"{self.pick(SEE).participle} {self.anyone()}")

    def action(self, subject: NounPhrase) -> str:
        """What a subject did, in the past tense; now and then with something of its own."""
        own = subject.their if subject.pronouns and self.chance(0.4) else ""
        kind = self.random.random()
        if kind < 0.3:
            tail = self.pick(TIMES) if self.chance(0.5) else self.place()
            return f"{self.pick(SLEEP).past} {tail}"
        if kind < 0.6:
            other = self.human(self.chance(0.5), own) if own else self.anyone()
            return f"{self.pick(SEE).past} {other}"
        if kind < 0.8:
            return f"{self.pick(TAKE).past} {self.thing(determiner=own)}"
        return f"{self.pick(EAT).past} {self.food()}"

    def clause(self) -> str:
        """A whole simple sentence, in the past or the present."""
        subject = self.anyone()
        verb = self.action(subject) if self.chance(0.5) else self.predicate()[subject.plural]
        return f"{subject} {verb}"

    def opener(self) -> str:
        """What makes a clause of the rest: so that the rest never starts with a capital."""
        subject = self.gendered()
        verb = self.pick(THINK)
        return f"{subject} {self.pick((verb.third, verb.past))} that"


def agreeing(verb: Forms, rest: str) -> Forms:
    """Both forms of a verb with the same rest."""
    return f"{verb[0]} {rest}".strip(), f"{verb[1]} {rest}".strip()


# --- the register ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """A construction with a good and a bad version; the function's name is its UID."""

    build: Callable[[Draw], tuple[str, str]]
    term: str
    field: str
    weight: float


@dataclass(frozen=True)
class Plain:
    """A construction for the text only."""

    build: Callable[[Draw], str]
    weight: float


CONTRASTS: dict[str, Contrast] = {}
PLAIN: list[Plain] = []
STORIES: list[Callable[[Draw], list[str]]] = []


def contrast(
    term: str, field: str, weight: float = 1.0
) -> Callable[[Callable[[Draw], tuple[str, str]]], Callable[[Draw], tuple[str, str]]]:
    """Register a function that returns (good, bad) under one of BLiMP's terms and fields.

    Args:
        term: `linguistics_term`.
        field: `field`.
        weight: how often the good sentence occurs in the text, relative to other contrasts.
    """

    def register(build: Callable[[Draw], tuple[str, str]]) -> Callable[[Draw], tuple[str, str]]:
        CONTRASTS[build.__name__] = Contrast(build, term, field, weight)
        return build

    return register


def plain(weight: float = 1.0) -> Callable[[Callable[[Draw], str]], Callable[[Draw], str]]:
    """Register a function that returns a sentence for the text only, and how often it occurs."""

    def register(build: Callable[[Draw], str]) -> Callable[[Draw], str]:
        PLAIN.append(Plain(build, weight))
        return build

    return register


def story(build: Callable[[Draw], list[str]]) -> Callable[[Draw], list[str]]:
    """Register a function that returns a few sentences about the same people and things."""
    STORIES.append(build)
    return build


# --- subject-verb agreement --------------------------------------------------------------------


@contrast("subject_verb_agreement", "morphology")
def agreement_across_prepositional_phrase(d: Draw) -> tuple[str, str]:
    """The boys near the cat sleep / *sleeps."""
    plural = d.mirror
    head, other = d.someone(plural), d.someone(not plural, "the")
    verb = d.predicate()
    subject = f"{head} {d.pick(NEAR)} {other}"
    return f"{subject} {verb[plural]}", f"{subject} {verb[not plural]}"


@contrast("subject_verb_agreement", "morphology")
def agreement_across_relative_clause(d: Draw) -> tuple[str, str]:
    """The boy who the girls like sleeps / *sleep."""
    plural = d.mirror
    subject = f"{d.someone(plural)} {d.relative(plural, d.someone(not plural))}"
    verb = d.predicate()
    return f"{subject} {verb[plural]}", f"{subject} {verb[not plural]}"


# --- anaphors and binding ----------------------------------------------------------------------


@contrast("anaphor_agreement", "morphology", weight=4)
def reflexive_gender(d: Draw) -> tuple[str, str]:
    """The queen praised herself / *himself."""
    gender = "mf"[d.mirror]
    start = f"{d.gendered(gender)} {d.tensed(d.pick(HURT))[False]}"
    end = d.pick(("", "", f" {d.place()}"))
    return f"{start} {REFLEXIVES[gender]}{end}", f"{start} {REFLEXIVES['fm'[d.mirror]]}{end}"


@contrast("anaphor_agreement", "morphology")
def reflexive_number(d: Draw) -> tuple[str, str]:
    """The boys hurt themselves / *himself."""
    plural, gender = d.mirror, d.pick(("m", "f", "n"))
    nouns = {"m": MALE, "f": FEMALE, "n": ANIMALS}[gender]
    determiner = d.pick((("the", "the", "this", "a"), ("the", "the", "these", "some"))[plural])
    subject = d.noun(d.pick(nouns), plural, gender, TRAITS, determiner)
    good, bad = REFLEXIVES[gender], REFLEXIVES["pl"]
    if plural:
        good, bad = bad, good
    start = f"{subject} {d.tensed(d.pick(HURT))[plural]}"
    return f"{start} {good}", f"{start} {bad}"


@contrast("binding", "syntax_semantics", weight=3)
def reflexive_in_embedded_clause(d: Draw) -> tuple[str, str]:
    """Anna said that Tom hurt himself / *herself."""
    near, far = ("f", "m") if d.mirror else ("m", "f")
    verb = d.pick(THINK)
    start = f"{d.gendered(far)} {d.pick((verb.past, verb.third))} that {d.gendered(near)}"
    start = f"{start} {d.tensed(d.pick(HURT))[False]}"
    return f"{start} {REFLEXIVES[near]}", f"{start} {REFLEXIVES[far]}"


@contrast("binding", "syntax_semantics")
def reflexive_across_relative_clause(d: Draw) -> tuple[str, str]:
    """The queen who helped the boys praised herself / *themselves."""
    gender, plural = d.pick(("m", "f")), d.mirror
    head = d.noun(d.pick(GENDERED[gender][1]), plural, gender, TRAITS, "the")
    inner_gender = d.pick(("m", "f"))
    inner = d.noun(d.pick(GENDERED[inner_gender][1]), not plural, inner_gender, TRAITS, "the")
    start = f"{head} {d.relative(plural, inner)} {d.tensed(d.pick(HURT))[plural]}"
    return f"{start} {head.reflexive}", f"{start} {inner.reflexive}"


# --- determiners and nouns ---------------------------------------------------------------------


def _determiner_noun(d: Draw, adjectives: str) -> tuple[str, str]:
    plural = d.mirror
    noun = d.pick(THINGS)
    start = f"{d.gendered()} {d.tensed(d.pick(TAKE))[False]}"
    end = d.pick(("", "", f" {d.place()}"))
    if d.chance(0.5):  # the determiner is wrong
        determiners = d.pick((("this", "these"), ("that", "those")))
        return (
            f"{start} {determiners[plural]} {adjectives}{noun[plural]}{end}",
            f"{start} {determiners[not plural]} {adjectives}{noun[plural]}{end}",
        )
    determiner = d.pick((("this", "that", "a", "every"), ("these", "those", "many", "two"))[plural])
    return (
        f"{start} {determiner} {adjectives}{noun[plural]}{end}",
        f"{start} {determiner} {adjectives}{noun[not plural]}{end}",
    )


@contrast("determiner_noun_agreement", "morphology")
def determiner_noun(d: Draw) -> tuple[str, str]:
    """Tom found this cup / *cups."""
    return _determiner_noun(d, "")


@contrast("determiner_noun_agreement", "morphology")
def determiner_noun_with_adjective(d: Draw) -> tuple[str, str]:
    """Tom found these heavy red cups / *cup."""
    return _determiner_noun(d, "".join(f"{d.pick(LOOKS)} " for _ in range(d.pick((1, 1, 2)))))


# --- polarity ----------------------------------------------------------------------------------


@contrast("npi_licensing", "syntax_semantics")
def npi_in_the_scope_of_negation(d: Draw) -> tuple[str, str]:
    """The boy who has seen Anna has not ever smiled / *The boy who has not seen Anna has ever smiled."""
    plural = d.chance(0.5)
    head, has = d.human(plural), HAVE[plural]
    seen, smiled = f"{d.pick(SEE).participle} {d.anyone()}", d.pick(SLEEP).participle
    return (
        f"{head} who {has} {seen} {has} not ever {smiled}",
        f"{head} who {has} not {seen} {has} ever {smiled}",
    )


@contrast("npi_licensing", "syntax_semantics")
def npi_in_the_scope_of_no(d: Draw) -> tuple[str, str]:
    """... no boy who saw the girls ever smiled / *... the boy who saw no girls ever smiled."""
    plural = d.chance(0.5)
    head, other = d.pick(MALE + FEMALE + PEOPLE)[plural], d.pick(MALE + FEMALE + PEOPLE)[True]
    verb, has = d.pick(SEE).past, HAVE[plural]
    opener, end = d.opener(), f"{has} ever {d.pick(SLEEP).participle}"
    return (
        f"{opener} no {head} who {verb} the {other} {end}",
        f"{opener} the {head} who {verb} no {other} {end}",
    )


# --- quantifiers -------------------------------------------------------------------------------


@contrast("quantifiers", "semantics")
def weak_and_strong_quantifiers(d: Draw) -> tuple[str, str]:
    """There is a / *every cat in the barn; almost every / *a cat slept."""
    plural = d.chance(0.5)
    weak, strong = (("a", "every"), ("some", "all"))[plural]
    noun = d.pick(PEOPLE + ANIMALS + THINGS)[plural]
    if d.mirror:
        start, end = "almost", f"{noun} {WAS[plural]} {d.place()}"
        return f"{start} {strong} {end}", f"{start} {weak} {end}"
    start, end = f"there {d.pick((BE, WAS))[plural]}", f"{noun} {d.place()}"
    return f"{start} {weak} {end}", f"{start} {strong} {end}"


@contrast("quantifiers", "semantics")
def superlative_quantifiers(d: Draw) -> tuple[str, str]:
    """... the boy who saw no girls ate at most two pies / *... no boy who saw the girls ate ..."""
    head, other = d.pick(MALE + FEMALE + PEOPLE)[False], d.pick(MALE + FEMALE + PEOPLE)[True]
    verb, opener = d.pick(SEE).past, d.opener()
    count = f"{d.pick(('at most', 'at least'))} {d.pick(('two', 'three', 'five', 'ten'))}"
    end = f"{d.pick(EAT).past} {count} {d.pick(FOOD).plural}"
    return (
        f"{opener} the {head} who {verb} no {other} {end}",
        f"{opener} no {head} who {verb} the {other} {end}",
    )


# --- fillers and gaps --------------------------------------------------------------------------


def _who_or_that(d: Draw, subject: str, verb: str) -> tuple[str, str]:
    known = d.pick(KNOW)
    start = f"{d.gendered()} {d.pick((known.past, known.third))}"
    if d.mirror:
        rest = f"{subject} {verb} {d.anyone()}"
        return f"{start} that {rest}", f"{start} who {rest}"
    end = d.pick(("", "", f" {d.place()}", f" {d.pick(TIMES)}"))
    return f"{start} who {subject} {verb}{end}", f"{start} that {subject} {verb}{end}"


@contrast("filler_gap_dependency", "syntax")
def who_or_that(d: Draw) -> tuple[str, str]:
    """Anna knows who / *that the boy saw; Anna knows that / *who the boy saw the cat."""
    return _who_or_that(d, str(d.anyone()), d.pick(SEE).past)


@contrast("filler_gap_dependency", "syntax")
def who_or_that_long_distance(d: Draw) -> tuple[str, str]:
    """Anna knows who / *that Tom thinks the boy saw; ... the boy who likes the girls saw."""
    if d.chance(0.5):
        subject = f"{d.gendered()} {d.pick(THINK).past} {d.anyone()}"
    else:
        plural = d.chance(0.5)
        inner = d.someone(d.chance(0.5))
        subject = f"{d.human(plural)} {d.relative(plural, inner)}"
    return _who_or_that(d, subject, d.pick(SEE).past)


# --- verb forms and verb frames ----------------------------------------------------------------


@contrast("irregular_forms", "morphology")
def irregular_past_and_participle(d: Draw) -> tuple[str, str]:
    """The boy broke / *broken the cup; the boy has broken / *broke the cup."""
    subject, verb, rest = d.anyone(), d.pick(BREAK), d.thing()
    if d.mirror:
        start = f"{subject} {d.pick((HAVE[subject.plural], 'had'))}"
        return f"{start} {verb.participle} {rest}", f"{start} {verb.past} {rest}"
    return f"{subject} {verb.past} {rest}", f"{subject} {verb.participle} {rest}"


@contrast("argument_structure", "syntax")
def transitivity(d: Draw) -> tuple[str, str]:
    """The boy saw / *slept the girl; the boy slept / *saw in the garden."""
    subject, seeing, sleeping = d.anyone(), d.pick(SEE), d.pick(SLEEP)
    if d.mirror:
        end = d.place()
        return f"{subject} {sleeping.past} {end}", f"{subject} {seeing.past} {end}"
    end = str(d.anyone())
    return f"{subject} {seeing.past} {end}", f"{subject} {sleeping.past} {end}"


@contrast("argument_structure", "syntax")
def passive(d: Draw) -> tuple[str, str]:
    """The boy was helped / *slept by the girl; the boy had slept / *helped near the girl."""
    subject, other = d.anyone(), d.anyone()
    seen, slept = d.pick(SEE).participle, d.pick(SLEEP).participle
    if d.mirror:
        start, end = f"{subject} {HAVE[subject.plural]}", f"{d.pick(NEAR)} {other}"
        return f"{start} {slept} {end}", f"{start} {seen} {end}"
    start, end = f"{subject} {WAS[subject.plural]}", f"by {other}"
    return f"{start} {seen} {end}", f"{start} {slept} {end}"


@contrast("control_raising", "syntax_semantics")
def tough_or_raising(d: Draw) -> tuple[str, str]:
    """The boy is easy / *likely to see; the boy is likely / *easy to sleep."""
    subject, tough, raising = d.anyone(), d.pick(TOUGH), d.pick(RAISING)
    start = f"{subject} {d.pick((BE, WAS))[subject.plural]}"
    end = d.pick(("", "", f" {d.place()}"))
    if d.mirror:
        end = f"to {d.pick(SLEEP).base}{end}"
        return f"{start} {raising} {end}", f"{start} {tough} {end}"
    end = f"to {d.pick(SEE).base}{end}"
    return f"{start} {tough} {end}", f"{start} {raising} {end}"


# --- ellipsis and islands ----------------------------------------------------------------------


@contrast("ellipsis", "syntax")
def noun_ellipsis(d: Draw) -> tuple[str, str]:
    """Tom ate one red apple and Anna ate two / *Tom ate one apple and Anna ate two red."""
    verb, noun, look = d.pick(EAT + TAKE).past, d.pick(FOOD), d.pick(LOOKS)
    count, other = d.pick((("one", "two"), ("one", "many"), ("two", "three"), ("three", "five")))
    start, end = f"{d.gendered()} {verb} {count}", f"and {d.gendered()} {verb} {other}"
    noun_form = noun[count != "one"]
    return f"{start} {look} {noun_form} {end}", f"{start} {noun_form} {end} {look}"


@contrast("island_effects", "syntax")
def coordinate_structure(d: Draw) -> tuple[str, str]:
    """Who did Tom and the girl see? / *Who did Tom see and the girl?"""
    verb = d.pick(SEE).base
    start, other = f"who {d.pick(('did', 'will', 'should', 'can'))} {d.anyone()}", d.anyone()
    return f"{start} and {other} {verb}?", f"{start} {verb} and {other}?"


@contrast("island_effects", "syntax")
def adjunct_island(d: Draw) -> tuple[str, str]:
    """Who did Tom see after greeting the girl? / *Who did Tom see the girl after greeting?"""
    start = f"who {d.pick(('did', 'will', 'should', 'can'))} {d.anyone()} {d.pick(SEE).base}"
    adjunct = f"{d.pick(('after', 'before', 'while'))} {d.pick(SEE).gerund}"
    other = d.anyone()
    return f"{start} {adjunct} {other}?", f"{start} {other} {adjunct}?"


# --- sentences for the text only ---------------------------------------------------------------


@plain()
def simple(d: Draw) -> str:
    """A clause."""
    return d.clause()


@plain()
def agreement(d: Draw) -> str:
    """A subject of any size with a verb that shows its number."""
    plural = d.chance(0.5)
    head = str(d.someone(plural))
    if d.chance(0.4):
        head = f"{head} {d.pick(NEAR)} {d.someone(d.chance(0.5), 'the')}"
    return f"{head} {d.predicate()[plural]}"


@plain()
def embedded(d: Draw) -> str:
    """A clause within a clause."""
    return f"{d.opener()} {d.clause()}"


@plain()
def joined(d: Draw) -> str:
    """Two clauses."""
    return f"{d.clause()} {d.pick(('and', 'but', 'because', 'while', 'when'))} {d.clause()}"


@plain()
def giving(d: Draw) -> str:
    """Two objects, in either order."""
    verb, thing, receiver = d.pick(GIVE).past, d.thing(), d.anyone()
    if d.chance(0.5):
        return f"{d.anyone()} {verb} {receiver} {thing}"
    return f"{d.anyone()} {verb} {thing} to {receiver}"


@plain()
def polar_question(d: Draw) -> str:
    """Did ...? Has ... ever ...?"""
    subject = d.anyone()
    if d.chance(0.4):
        return f"did {subject} {d.pick(SEE).base} {d.pick(('anyone', str(d.anyone())))}?"
    ever = d.pick(("ever ", ""))
    return f"{HAVE[subject.plural]} {subject} {ever}{d.pick(SLEEP).participle} {d.place()}?"


@plain()
def content_question(d: Draw) -> str:
    """Who did ...? Who ...?"""
    if d.chance(0.5):
        return f"who {d.tensed(d.pick(SEE))[False]} {d.anyone()}?"
    auxiliary = d.pick(("did", "will", "should", "can"))
    return f"who {auxiliary} {d.anyone()} {d.pick(SEE).base} {d.place()}?"


@plain()
def negation(d: Draw) -> str:
    """Any, at all, yet and ever after not; some, already and often without it."""
    subject = d.anyone()
    thing, has = d.pick(THINGS).plural, HAVE[subject.plural]
    if d.mirror:
        return d.pick(
            (
                f"{subject} did not {d.pick(TAKE).base} any {thing}",
                f"{subject} did not {d.pick(SLEEP).base} at all",
                f"{subject} {has} not {d.pick(SLEEP).participle} yet",
                f"{subject} {has} not ever {d.pick(SLEEP).participle} {d.place()}",
                f"{subject} {has} not {d.pick(SEE).participle} anyone",
            )
        )
    return d.pick(
        (
            f"{subject} {d.pick(TAKE).past} some {thing}",
            f"{subject} {has} already {d.pick(SLEEP).participle}",
            f"{subject} {has} often {d.pick(SLEEP).participle} {d.place()}",
            f"{subject} {has} {d.pick(SEE).participle} someone",
        )
    )


@plain()
def negation_in_a_relative_clause(d: Draw) -> str:
    """A "not" or "no" that reaches no further than its own clause."""
    plural = d.chance(0.5)
    head, has = d.human(plural), HAVE[plural]
    often = d.pick(("often", "already", "also"))
    if d.chance(0.5):
        inner = f"{has} not {d.pick(SEE).participle} {d.anyone()}"
    else:
        inner = f"{d.pick(SEE).past} no {d.pick(PEOPLE).plural}"
    opener = f"{d.opener()} " if d.chance(0.5) else ""
    return f"{opener}{head} who {inner} {has} {often} {d.pick(SLEEP).participle}"


@plain()
def no_and_numbers(d: Draw) -> str:
    """No one eats "more than" or "fewer than" so many; "at most" goes with other subjects."""
    number = d.pick(("two", "three", "five", "ten"))
    person = d.pick(MALE + FEMALE + PEOPLE).singular
    relative = d.pick(("", f" who {d.pick(SEE).past} the {d.pick(PEOPLE).plural}"))
    if d.mirror:
        subject, count = f"no {person}{relative}", d.pick(("more than", "fewer than"))
    else:
        subject, count = f"the {person}{relative}", d.pick(("at most", "at least", "more than"))
    opener = f"{d.opener()} " if d.chance(0.5) else ""
    return f"{opener}{subject} {d.pick(EAT).past} {count} {number} {d.pick(FOOD).plural}"


@plain()
def only_and_nobody(d: Draw) -> str:
    """Other words that let "ever" in."""
    subject = d.pick((f"only {d.name()}", "nobody", "no one", f"no {d.pick(PEOPLE).singular}"))
    return f"{subject} has ever {d.pick(SEE).participle} {d.anyone()}"


@plain()
def condition(d: Draw) -> str:
    """If you ever ..."""
    verb = d.pick(SEE).base
    return f"if you ever {verb} {d.anyone()}, {d.pick(GIVE).base} {d.name()} {d.thing()}"


@plain()
def possession(d: Draw) -> str:
    """Anna has a red hat."""
    subject = d.anyone()
    return f"{subject} {HAVE[subject.plural]} {d.thing() if d.mirror else d.food()}"


@plain(weight=3)
def pronouns(d: Draw) -> str:
    """He and she, his and her."""
    subject = d.gendered()
    they, their = subject.they, subject.their
    return d.pick(
        (
            f"{subject} {d.pick(TAKE).past} {d.thing(determiner=their)} {d.place()}",
            f"{subject} {d.pick(SEE).past} {d.human(d.mirror, their)}",
            f"{subject} {d.pick(THINK).past} that {they} {d.action(subject)}",
            f"when {subject} {d.pick(SLEEP).past}, {they} was {d.pick(TRAITS)}",
            f"{subject} {d.pick(TAKE).past} {d.thing()} because {they} was {d.pick(TRAITS)}",
        )
    )


@plain(weight=3)
def emphasis(d: Draw) -> str:
    """The queen herself smiled: who goes with which pronoun, at no distance."""
    subject = d.gendered()
    return f"{subject} {subject.reflexive} {d.action(subject)}"


@plain()
def description(d: Draw) -> str:
    """Leo is a kind prince; Anna is the sister of Tom."""
    name = d.name()
    noun = d.noun(
        d.pick(GENDERED[name.gender][1]), False, name.gender, TRAITS, d.pick(("a", "the"))
    )
    return f"{name} is {noun}{d.pick(('', f' of {d.gendered()}', f' {d.place()}'))}"


@plain()
def comparison(d: Draw) -> str:
    """One is more so than another."""
    subject = d.anyone()
    degree = d.pick(
        (f"as {d.pick(TRAITS)} as", f"more {d.pick(('polite', 'tired', 'careful'))} than")
    )
    return f"{subject} {d.pick((BE, WAS))[subject.plural]} {degree} {d.anyone()}"


# --- stories -----------------------------------------------------------------------------------


@story
def lost_and_found(d: Draw) -> list[str]:
    """Somebody loses a thing, and somebody else finds it."""
    loser, finder = d.name(), d.gendered()
    thing = f"{d.pick(LOOKS)} {d.pick(THINGS).singular}"
    lines = [
        f"{loser} had a {thing}",
        f"{d.pick(TIMES)}, {loser.they} lost it {d.place()}",
        f"{loser.they} looked for it, but {loser.they} did not find it anywhere",
        f"{finder} found the {thing} {d.place()} and gave it to {loser.them}",
        f"{loser} thanked {finder} and {d.pick(SLEEP).past}",
    ]
    if d.chance(0.5):
        lines[2] = f"has anyone seen my {thing}?"
        lines.insert(3, "nobody had seen it yet")
    return lines


@story
def gift(d: Draw) -> list[str]:
    """Somebody gives something to somebody who is pleased, or not."""
    giver, receiver = d.name("m"), d.name("f")
    if d.mirror:
        giver, receiver = receiver, giver
    thing = d.thing(plural=d.chance(0.5), determiner="the")
    pleased = d.pick(("smiled", "laughed", "was very happy"))
    return [
        f"{giver} {d.pick(('gave', 'sent', 'brought'))} {receiver} {thing}",
        f"{receiver.they} {pleased} because {receiver.they} had wanted {thing.them} all summer",
        f"{receiver} {d.pick(('admired', 'kept', 'loved'))} {thing.them}",
        f"{receiver.their} {d.pick(('friend', 'neighbor', 'teacher'))} {d.pick(SEE).past} {giver.them} too",
    ]


@story
def visit(d: Draw) -> list[str]:
    """Somebody goes somewhere, meets somebody, and eats."""
    guest, place = d.gendered(), d.pick(PLACES)
    host = d.someone(d.mirror, ("a", "two")[d.mirror])
    them = "them" if host.plural else "the " + host.text.removeprefix("a ")
    eat = d.pick(EAT).past
    return [
        f"{d.pick(TIMES)}, {guest} went to the {place}",
        f"{guest.they} met {host} there",
        f"{guest.they} had not ever seen {them} before",
        f"they {eat} {d.food()} and {d.pick(SLEEP).past} {d.place()}",
        f"then {guest} went home by {guest.reflexive}",
    ]


@story
def weather(d: Draw) -> list[str]:
    """A day, and what two did in it."""
    first, second = d.name("m"), d.name("f")
    if d.mirror:
        first, second = second, first
    return [
        f"it was a {d.pick(('cold', 'warm', 'rainy', 'sunny', 'windy'))} day",
        f"{first} and {second} were {d.pick(SLEEP).gerund} {d.place()}",
        f"{first.they} wanted to {d.pick(('find', 'visit', 'meet', 'see'))} {d.someone(False, 'the')}",
        f"{second.they} was {d.pick(TRAITS)}, so {second.they} {d.action(second)}",
        f"in the evening, they {d.pick(EAT).past} {d.food()} together",
    ]


@story
def conversation(d: Draw) -> list[str]:
    """Question and answer."""
    asked, seen = d.name(), d.someone(d.mirror, "the")
    verb = d.pick(("see", "meet", "visit", "find", "follow", "greet"))
    they = "they" if seen.plural else "it" if seen.gender == "n" else ""
    answer = d.pick(("yes", "no"))
    lines = [
        f"did {asked} {verb} {seen}?",
        f"{answer}, {asked.they} {'did' if answer == 'yes' else 'did not'}",
    ]
    if answer == "yes" and they:
        lines.append(f"{they} {WAS[seen.plural]} {d.place()}")
    return lines


# --- text and pairs ----------------------------------------------------------------------------

STORY_SHARE = 0.12
CONTRAST_SHARE = 0.5
HELD_OUT_OF = 8


def held_out(sentence: str) -> bool:
    """Whether a sentence is kept for the minimal pairs: a pure function of its text."""
    return zlib.crc32(sentence.encode()) % HELD_OUT_OF == 0


def _contains_held_out(sentence: str) -> bool:
    """Whether the sentence, or the end of it from any capital on, is held out ("..., Tom slept.")."""
    starts = [match.start() for match in re.finditer(r"\b[A-Z]", sentence)]
    return any(held_out(sentence[start:]) for start in starts)


def finish(sentence: str) -> str:
    """A capital at the start, a full stop at the end, "an" before a vowel."""
    sentence = re.sub(r"\ba(?= [aeiou])", "an", sentence)
    end = "" if sentence.endswith("?") else "."
    return f"{sentence[0].upper()}{sentence[1:]}{end}"


def _paragraph(d: Draw) -> list[str]:
    kind = d.random.random()
    if kind < STORY_SHARE:
        return [finish(line) for line in d.pick(STORIES)(d)]
    if kind < STORY_SHARE + CONTRAST_SHARE:
        return [finish(d.weighted(list(CONTRASTS.values())).build(d)[0])]
    return [finish(d.weighted(PLAIN).build(d))]


def generate_text(sentences: int, seed: int) -> Iterator[str]:
    """Lines of text, each a sentence or a short story, until there are so many sentences.

    The same seed gives the same text. No good sentence of `minimal_pairs`, whatever its seed,
    occurs in it.
    """
    random = Random(f"text {seed}")
    written = 0
    while written < sentences:
        lines = _paragraph(Draw(random, random.random() < 0.5))
        if any(map(_contains_held_out, lines)):
            continue
        lines = lines[: sentences - written]
        written += len(lines)
        yield " ".join(lines)


def minimal_pairs(per_paradigm: int, seed: int) -> dict[str, list[Pair]]:
    """Held-out minimal pairs, per paradigm, no two of a paradigm the same.

    Even-numbered pairs are of one mirrored half, odd-numbered ones of the other.

    Returns:
        UID -> pairs with BLiMP's keys.
    """
    paradigms = {}
    for uid, paradigm in CONTRASTS.items():
        random = Random(f"{uid} {seed}")
        pairs: dict[str, Pair] = {}
        while len(pairs) < per_paradigm:
            good, bad = map(finish, paradigm.build(Draw(random, len(pairs) % 2 == 1)))
            if held_out(good) and good not in pairs:
                pairs[good] = Pair(
                    sentence_good=good,
                    sentence_bad=bad,
                    field=paradigm.field,
                    linguistics_term=paradigm.term,
                    UID=uid,
                )
        paradigms[uid] = list(pairs.values())
    return paradigms


def write_corpus(folder: str | Path, sentences: int, seed: int) -> None:
    """Write `train/` and `dev/` text and `pairs/` into a folder, for use as any other corpus.

    Args:
        folder: receives train/grammar.train, dev/grammar.dev (a twentieth as long, another seed)
            and pairs/UID.jsonl (200 minimal pairs each, BLiMP's JSON Lines).
        sentences: of the training text.
        seed: of everything.

    Raises:
        DataError: the folder cannot be written to.
    """
    folder = Path(folder)
    for split, count in (("train", sentences), ("dev", max(1, sentences // 20))):
        with writing(folder / split / f"grammar.{split}") as out:
            for line in generate_text(count, seed if split == "train" else seed + 1):
                out.write(f"{line}\n".encode())
    for uid, pairs in minimal_pairs(200, seed).items():
        with writing(folder / "pairs" / f"{uid}.jsonl") as out:
            for pair in pairs:
                out.write(f"{json.dumps(pair)}\n".encode())
