"""Templates in pieces, for programs without Jinja: what they make of messages is what Jinja makes."""

from datetime import datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chat_models import CHATML, GEMMA, LLAMA_3, TEMPLATES, ZEPHYR
from squat.chat_template import ChatTemplate
from squat.deploy.chat_pieces import DATE, chat_pieces, prompt_of

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
KNOWN = {"chatml": CHATML, "llama 3": LLAMA_3, "gemma": GEMMA, "zephyr": ZEPHYR}
PIECES = {name: chat_pieces(ChatTemplate(text, NAMES, name)) for name, text in KNOWN.items()}


def dated(text):
    """With the date in place of its forms, as squat-run does it."""
    while DATE[0] in text:
        before, _, rest = text.partition(DATE[0])
        form, _, after = rest.partition(DATE[1])
        text = before + datetime.now().strftime(form) + after
    return text


messages = st.text(st.characters(exclude_categories=["Cs", "Co"]))


@pytest.mark.parametrize("name", KNOWN)
@given(told=st.none() | messages.filter(str.strip), text=messages)
@example(told=None, text="  Hello,\n\n  you\t\u2003")
@example(told="\u00a0Be brief.\n", text="Hi")
def test_pieces_make_the_prompt_that_the_template_makes(name, told, text):
    conversation = [] if told is None else [{"role": "system", "content": told}]
    conversation.append({"role": "user", "content": text})
    expected = ChatTemplate(KNOWN[name], NAMES, name).render(conversation)
    assert dated(prompt_of(PIECES[name], told, text)) == expected


def test_the_date_is_that_of_the_day_of_the_run():
    assert "".join((DATE[0], "%Y", DATE[1])) in PIECES["llama 3"]["begin"]


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATES["everything"],
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content | length }}: {{ messages[0].content }}",
        "{% if 'Hello' in messages[0].content %}Hi!{% endif %}{{ messages[0].content }}",
        "{{ raise_exception('never') }}",
        "no message at all",
    ],
)
def test_a_template_that_is_more_than_text_around_messages_has_no_pieces(template):
    assert chat_pieces(ChatTemplate(template, NAMES, "x")) == {}


def test_a_template_without_a_place_for_the_system_has_none():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[INST] {{ messages[0].content }} [/INST]"
    )
    found = chat_pieces(ChatTemplate(template, NAMES, "x"))
    assert found == {"begin": "[INST] ", "end": " [/INST]", "trim": ""}
