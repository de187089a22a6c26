"""The words of the built-in corpus, and the regular part of English morphology.

A word is written once; its regular forms are derived, irregular ones follow it. Words are grouped
by what the grammar asks of them (who can do what to what), not by topic; a new word is one entry.
"""

from typing import NamedTuple


class Noun(NamedTuple):
    """A noun: `noun[False]` is its singular, `noun[True]` its plural."""

    singular: str
    plural: str


class Verb(NamedTuple):
    """The five forms of a verb; `verb.present[plural]` agrees with a third-person subject."""

    base: str
    third: str
    past: str
    participle: str
    gerund: str

    @property
    def present(self) -> tuple[str, str]:
        """Present tense with a singular and with a plural subject."""
        return self.third, self.base


def _with_s(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh", "o")):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def _noun(entry: str) -> Noun:
    singular, _, plural = entry.partition("/")
    return Noun(singular, plural or _with_s(singular))


def _verb(entry: str) -> Verb:
    base, *irregular = entry.split("/")
    doubled = base.endswith("+")  # "hug+": hugged, hugging
    base = base.rstrip("+")
    stem = base + base[-1] if doubled else base
    silent_e = base.endswith("e") and not base.endswith("ee")
    if base.endswith("y") and base[-2] not in "aeiou":
        past = f"{base[:-1]}ied"
    else:
        past = f"{base}d" if base.endswith("e") else f"{stem}ed"
    past, participle = irregular or (past, past)
    gerund = f"{base[:-1] if silent_e else stem}ing"
    return Verb(base, _with_s(base), past, participle, gerund)


def _words(entries: str) -> tuple[str, ...]:
    return tuple(entries.split())


def _nouns(entries: str) -> tuple[Noun, ...]:
    return tuple(map(_noun, entries.split()))


def _verbs(entries: str) -> tuple[Verb, ...]:
    return tuple(map(_verb, entries.split()))


# --- who ---------------------------------------------------------------------------------------

MEN = _words("Adam Ben David Felix Hugo Leo Paul Tom")
WOMEN = _words("Alice Anna Clara Emma Julia Lucy Nora Rosa")
MALE = _nouns("boy man/men king prince brother uncle father son")
FEMALE = _nouns("girl woman/women queen princess sister aunt mother daughter")
PEOPLE = _nouns(
    "child/children teacher doctor farmer baker sailor painter singer neighbor friend student"
    " driver gardener judge nurse pilot guest"
)
ANIMALS = _nouns(
    "dog cat horse bird mouse/mice goose/geese wolf/wolves fox rabbit cow duck bear goat monkey"
)

# --- what --------------------------------------------------------------------------------------

THINGS = _nouns(
    "book cup box lamp letter picture key ball basket chair knife/knives toy hat coat flower stone"
    " bell ring shoe map coin bottle blanket candle drum brush leaf/leaves clock plate pencil"
)
FOOD = _nouns("apple cake egg pie cookie pear potato onion carrot sandwich")
PLACES = _words(
    "garden house kitchen river forest village school market bridge hill barn castle tower field"
    " lake road park library station bakery"
)

# --- how ---------------------------------------------------------------------------------------

TRAITS = _words(
    "tall happy old young clever kind quiet brave tired hungry proud lazy shy angry busy polite"
)
LOOKS = _words("red small big blue new heavy round green white black yellow pretty clean old")
TOUGH = ("easy", "hard", "impossible", "difficult", "simple")
RAISING = ("likely", "certain", "eager", "able", "sure")
TIMES = ("yesterday", "in the morning", "last night", "on Sunday", "in the evening", "last summer")
HABITS = ("every day", "at night", "in the winter", "on Sundays", "all the time")
NEAR = ("near", "behind", "next to", "in front of", "beside")

# --- does --------------------------------------------------------------------------------------

SLEEP = _verbs(  # never take an object
    "smile laugh arrive dance yawn sneeze rest work vanish wait shiver listen cough"
    " sleep/slept/slept fall/fell/fallen swim+/swam/swum sit+/sat/sat rise/rose/risen"
)
SEE = _verbs(  # always take an object, which can be a person
    "admire visit thank follow greet invite meet/met/met like love notice trust avoid"
    " catch/caught/caught see/saw/seen know/knew/known find/found/found describe surprise"
)
HURT = _verbs(  # what one can do to oneself
    "help praise wash blame defend hide/hid/hidden hurt/hurt/hurt teach/taught/taught admire"
    " describe see/saw/seen draw/drew/drawn trust warn"
)
TAKE = _verbs(  # always take an object, a thing
    "carry buy/bought/bought sell/sold/sold lose/lost/lost bring/brought/brought clean drop+"
    " hold/held/held find/found/found use want make/made/made"
)
BREAK = _verbs(  # things, with a participle that differs from the past
    "break/broke/broken choose/chose/chosen draw/drew/drawn hide/hid/hidden steal/stole/stolen"
    " take/took/taken throw/threw/thrown see/saw/seen bite/bit/bitten tear/tore/torn shake/shook/shaken"
)
GIVE = _verbs("give/gave/given show/showed/shown send/sent/sent hand offer bring/brought/brought")
EAT = _verbs("eat/ate/eaten cook buy/bought/bought bake share taste")
THINK = _verbs("think/thought/thought say/said/said believe hope claim")  # that ...
KNOW = _verbs(  # that ..., or who ...
    "know/knew/known remember forget+/forgot/forgotten learn discover notice see/saw/seen"
)
