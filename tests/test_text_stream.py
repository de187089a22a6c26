"""Stop strings: wherever a text is cut into pieces, it ends in the same place, and none is ever shown."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squat.errors import EngineError
from squat.text_stream import StopStrings

LETTERS = st.text("ab日", max_size=24)
STOPS = st.lists(st.text("ab日", min_size=1, max_size=4), max_size=4)


def cut_off(text, stop):
    """Character by character: the end is where one is complete, and the longest of those is taken off."""
    for end in range(len(text) + 1):
        if complete := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(text=LETTERS, stop=STOPS, cuts=st.lists(st.integers(0, 24), max_size=8))
def test_a_text_ends_at_its_first_stop_string_however_it_comes(text, stop, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stream, shown = StopStrings(stop), ""
    expected, stops = cut_off(text, stop)
    for begin, end in pairwise(edges):
        shown += stream.push(text[begin:end])
        assert expected.startswith(shown)  # nothing has to be taken back
        if stream.found:
            break
    assert shown + stream.rest() == expected
    assert stream.found == stops


@given(text=LETTERS, stop=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text, stop):
    stream = StopStrings(stop)
    shown = "".join(stream.push(character) for character in text)
    if not stream.found:
        held = text[len(shown) :]
        assert not held or any(s.startswith(held) for s in stop)


def test_what_stops_nothing_is_refused():
    with pytest.raises(EngineError, match="stop: a string is empty"):
        StopStrings(["a", ""])
    with pytest.raises(EngineError, match="stop: is one string"):
        StopStrings("a")
