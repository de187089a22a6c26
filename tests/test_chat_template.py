"""Chat templates: the prompts that transformers makes, no way out, one line for what is wrong."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader
from transformers import PreTrainedTokenizerFast

from chat_models import (
    CHATML,
    CONVERSATIONS,
    GEMMA,
    LLAMA_3,
    TEMPLATES,
    ZEPHYR,
    assistant,
    chat_file,
    system,
    user,
)
from engine_models import random_model
from models import tiny_model
from squat.chat_template import ChatTemplate
from squat.checkpoints import load_tokenizer, save_model
from squat.data.tokenizer import id_limit
from squat.deploy.gguf import write_gguf
from squat.engine import Engine
from squat.errors import ChatError
from squat.quantization import SquatConfig, quantize
from tokenizer_kinds import KINDS

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
AROUND = {
    "llama-2": ("<s>", "</s>"),
    "llama-3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "gpt-2": ("<|endoftext|>", "<|endoftext|>"),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name, conversation):
    messages = CONVERSATIONS[conversation]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["llama-2"](), **SPECIAL)
    expected = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
    )
    template = ChatTemplate(TEMPLATES[name], tokenizer.special_tokens_map, "m.gguf")
    assert template.render(messages) == expected
    assert messages[-1]["content"].strip() in expected


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, GEMMA, ZEPHYR])
@pytest.mark.parametrize("kind", AROUND)
def test_an_exported_folder_has_its_template_and_its_tokens(tmp_path, shell, kind, template):
    special = dict(zip(("bos_token", "eos_token"), AROUND[kind], strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), **special)
    tokenizer.chat_template = template
    model = tiny_model(
        "llama", vocab_size=id_limit(tokenizer) + 2, tie_word_embeddings=True,
        max_position_embeddings=512,
    )  # fmt: skip
    quantize(model, SquatConfig(activation_bits=8))
    save_model(model, tokenizer, tmp_path / "m")
    shell.succeed("export", tmp_path / "m", tmp_path / "m.gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == template
    told = json.loads(fields["squat.tokenizer.special_tokens"].contents())
    assert told == special
    engine, tokenizer = Engine(tmp_path / "m.gguf", threads=1), load_tokenizer(str(tmp_path / "m"))
    for messages in CONVERSATIONS.values():
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert engine.chat_tokens(messages) == expected


def test_of_several_templates_the_default_one_is_exported(tmp_path, shell):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["gpt-2"](), **SPECIAL)
    for templates, expected in (({"default": CHATML, "tool_use": ZEPHYR}, CHATML), (None, None)):
        tokenizer.chat_template = templates
        model = quantize(tiny_model(vocab_size=id_limit(tokenizer)), SquatConfig())
        save_model(model, tokenizer, tmp_path / "m")
        shell.succeed("export", tmp_path / "m", tmp_path / "m.gguf")
        found = GGUFReader(tmp_path / "m.gguf").fields.get("tokenizer.chat_template")
        assert (found and found.contents()) == expected


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ dict.__base__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].__class__ }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__call__ = 1 %}{{ ns }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_does_not_get_out(escape):
    messages = [user("Hi")]
    inside = ChatTemplate(CHATML, SPECIAL, "m.gguf").render(messages)
    try:
        assert ChatTemplate(CHATML + escape, SPECIAL, "m.gguf").render(messages) == inside
    except ChatError as refused:
        assert re.fullmatch(r"m\.gguf: chat template: .*", str(refused))  # noqa: PT017, either will do
    assert messages == [user("Hi")]


@pytest.mark.parametrize("escape", ESCAPES[:1] + ESCAPES[6:8] + ESCAPES[-6:])
def test_what_would_do_harm_is_refused(escape):
    with pytest.raises(ChatError, match=r"m\.gguf: chat template: "):
        ChatTemplate(CHATML + escape, SPECIAL, "m.gguf").render([user("Hi")])


BOMBS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ 10 ** 12 * ['x'] }}",
    "{{ 9 ** 99999999 }}",
    "{{ 'x' | center(1000000000000) }}",
    "{{ 'x' | indent(width=1000000000000, first=true) }}",
    "{{ 'x'.ljust(1000000000000) }}",
    "{{ '%999999999999d' % 5 }}",
    "{{ '%*d' % (999999999999, 5) }}",
    "{{ '%999999999999d' | format(5) }}",
    "{{ '{:>999999999999}'.format(5) }}",
    "{% set x = 'x' * 99999 %}{{ x | replace('x', x) }}",
    "{% set x = 'x' * 99999 %}{{ x.replace('x', x) }}",
    "{% set x = 'x' * 99999 %}{{ range(99999) | join(x) }}",
    "{% set x = 'x' * 99999 %}{{ range(99999) | map('string') | join(x) }}",
    "{% set x = 'x' * 99999 %}{{ x.join(x) }}",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_comes_to_an_end(bomb):
    template = ChatTemplate(CHATML + bomb, SPECIAL, "m.gguf")
    with pytest.raises(ChatError, match=r"m\.gguf: chat template: "):
        template.render([user("Hi")])
    # What one rendering has used up, the next one has again.
    assert ChatTemplate(CHATML, SPECIAL, "m.gguf").render([user("Hi")])


def test_a_long_conversation_is_no_bomb():
    messages = [m for i in range(2000) for m in (user("Why?" * 500), assistant("Because." * 100))]
    assert len(ChatTemplate(CHATML, SPECIAL, "m.gguf").render(messages)) > 5_000_000


REFUSED = {
    "user and assistant must alternate; give the messages": (GEMMA, [user("a"), user("b")]),
    "element 0: the chat template of m.gguf leaves out this message of the role 'system'": (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        [system("Be brief."), user("a")],
    ),
    "element 1: role 'usr' is unknown; choose system, user, assistant": (
        CHATML,
        [user("a"), {"role": "usr", "content": "b"}],
    ),
    "there are none": (CHATML, []),
    "element 0: is 'Hello', expected a role and a content": (CHATML, ["Hello"]),
    "element 0: is {'role': 'user'}, expected": (CHATML, [{"role": "user"}]),
    "element 0: content is 5, expected a text": (CHATML, [{"role": "user", "content": 5}]),
    "element 0: content: character 1 is U+D83D": (CHATML, [user("\ud83d")]),
    "TypeError: ": ("{{ messages[0].content + 1 }}", [user("a")]),
    "UndefinedError: 'nothing' is undefined; correct": ("{{ nothing.a }}", [user("a")]),
    "ZeroDivisionError: ": ("{{ 1 / 0 }}", [user("a")]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_makes_no_prompt_is_said_in_one_line(message):
    template, messages = REFUSED[message]
    with pytest.raises(ChatError) as raised:
        ChatTemplate(template, {}, "m.gguf").render(messages)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_no_template_is_said_with_its_line():
    for source in ("a\n{% if %}", "a\n{{ b", "a\n{% unknown %}", "a\n{% generation %}"):
        with pytest.raises(ChatError, match=r"m.gguf: chat template, line 2: .*; correct the"):
            ChatTemplate(source, {}, "m.gguf")


def test_a_file_without_a_template_says_what_to_do(tmp_path: Path):
    engine = Engine(chat_file(tmp_path / "m.gguf", None), threads=1)
    with pytest.raises(ChatError, match=r"m\.gguf: has no chat template .* or use squat generate"):
        engine.chat([user("a")])
    assert engine.generate("a", 2) == engine.generate("a", 2)


def test_special_tokens_that_are_none_are_said(tmp_path: Path):
    model = replace(random_model(), chat_template=CHATML)
    model.special_tokens = ["<s>"]  # type: ignore[assignment]
    write_gguf(tmp_path / "m.gguf", model)
    engine = Engine(tmp_path / "m.gguf", threads=1)
    with pytest.raises(ChatError, match=r"key squat.tokenizer.special_tokens is no JSON object"):
        engine.chat([user("a")])


def test_an_assistant_may_be_shortened_by_its_template():
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] }};{% endfor %}"
    said = [user("a"), assistant("<think>x</think>b"), user("c")]
    assert ChatTemplate(source, {}, "m").render(said) == "a;b;c;"
