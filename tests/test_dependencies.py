"""What is installed with Squat is what SECURITY.md lists, under licences that bind nobody who ships it."""

import re
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest

SECURITY = (Path(__file__).parents[1] / "SECURITY.md").read_text()
FOR_DEVELOPERS = {"dev", "docs"}
SAID = {
    name: licence
    for names, licence in re.findall(r"^\| ([\w, -]+) \| .* \| (.*) \|$", SECURITY, re.MULTILINE)
    if names != "package"
    for name in names.split(", ")
}


def requirement(text):
    """The name of what is required, and the extras that require it."""
    return re.match(r"[\w.-]+", text)[0].lower(), set(re.findall(r"extra == [\"'](\w+)", text))


def licences(name):
    """What a package says of its licence, in lower case."""
    about = distribution(name).metadata
    classifiers = [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    first = (about.get("License") or "").split("\n")[0]
    return " ".join([about.get("License-Expression") or "", first, *classifiers]).lower()


def installed(names):
    """These packages and all that they need, as far as they are there."""
    found, rest = set(), list(names)
    while rest:
        name = re.sub(r"[-_.]+", "-", rest.pop()).lower()
        try:
            needed = [requirement(text) for text in distribution(name).requires or []]
        except PackageNotFoundError:  # of another platform or Python
            continue
        if name not in found:
            found.add(name)
            rest += [other for other, extras in needed if not extras]
    return found


def test_the_list_is_complete():
    needed = [requirement(text) for text in requires("squat")]
    direct = {name for name, extras in needed if not extras & FOR_DEVELOPERS and name != "squat"}
    assert set(SAID) == direct


@pytest.mark.parametrize("name", SAID)
def test_a_licence_is_as_said(name):
    words = {"psf-2.0": ["psf-2.0", "python software foundation"], "apache-2.0": ["apache"]}
    first = SAID[name].split(" and ")[0].lower()
    said = words.get(first, [first.removesuffix("-3-clause")])
    assert any(word in licences(name) for word in said), licences(name)


def test_nothing_binds_whoever_ships_it():
    every = installed(SAID)
    assert len(every) > len(SAID)
    for name in every:
        assert not re.search(r"(?<!l)gpl|(?<!lesser )general public", licences(name)), name
