"""Small models that talk (nonsense), and chat templates of the kinds that real models have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine_models import byte_level_tokenizer, random_model
from squat.chat_template import ChatTemplate
from squat.deploy.chat_pieces import chat_pieces
from squat.deploy.gguf import write_gguf
from squat.errors import ChatError

CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message.role != 'system' %}\n"
    "        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}\n"
    "    {% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set told = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    "    {%- set told = '' %}\n"
    "{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nIt is ' + strftime_now('%Y') + '.\\n' }}\n"
    "{%- if tools is not none %}\n"
    "    {{- tools | tojson(indent=4) }}\n"
    "{%- endif %}\n"
    "{{- told + '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}\n"
    "    {{- message.content | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}\n"
    "{%- set ns = namespace(told='', rest=messages) -%}\n"
    "{%- if messages[0].role == 'system' -%}\n"
    "    {%- set ns.told = messages[0].content + '\\n\\n' -%}\n"
    "    {%- set ns.rest = messages[1:] -%}\n"
    "{%- endif -%}\n"
    "{%- for message in ns.rest -%}\n"
    "    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}\n"
    "        {{ raise_exception('user and assistant must alternate') }}\n"
    "    {%- endif -%}\n"
    "    {%- set role = 'model' if message.role == 'assistant' else message.role -%}\n"
    "    {{ '<start_of_turn>' + role + '\\n' + (ns.told if loop.first else '') }}\n"
    "    {{- message.content | trim + '<end_of_turn>\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "    {{ '<start_of_turn>model\\n' }}\n"
    "{%- endif -%}\n"
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}"
)
EVERYTHING = (
    "{%- macro turn(name, text) -%}[{{ name | upper }}] {{ text | tojson }}{%- endmacro -%}\n"
    "{% set extra = 1 %}\n"
    "{% for message in messages %}\n"
    "  {% if loop.index > 8 %}{% break %}{% endif %}\n"
    "  {% if not message.content %}{% continue %}{% endif %}\n"
    "  {% if message.role == 'assistant' %}\n"
    "    {% generation %}\n"
    "    {% set extra = 2 %}\n"
    "{{ message.content.split('</think>')[-1] }}{{ extra }}\n"
    "    {% endgeneration %}\n"
    "  {% else %}\n"
    "{{ turn(message.role, message.content) }} {{ message.content }} <b> & '{{ extra }}'\n"
    "  {% endif %}\n"
    "{% endfor %}\n"
    "{{ dict(a=1) | tojson }}{{ pad_token }}{{ unk_token is defined }}{{ documents is none }}\n"
)
HERMES = (
    "{%- if tools %}\n"
    "    {{- '<|im_start|>system\nYou may call functions:\n' }}\n"
    "    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}\n"
    '    {{- \'For a call return <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n\' }}\n'
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'tool' %}\n"
    "        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}\n"
    "    {%- else %}\n"
    "        {{- '<|im_start|>' + message.role + '\n' + message.content }}\n"
    "        {%- for call in message.tool_calls or [] %}\n"
    '            {{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}\n'
    "            {{- call.function.arguments | tojson + '}\n</tool_call>' }}\n"
    "        {%- endfor %}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_end|>\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}\n"
)
TEMPLATES = {
    "hermes": HERMES,
    "chatml": CHATML,
    "llama 3": LLAMA_3,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "everything": EVERYTHING,
}
CONTROL = ["<|im_start|>", "<|im_end|>"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


CONVERSATIONS = {
    "one": [user("Hello!")],
    "blanks": [user("  Hello,\n\n  you\t")],
    "system": [
        system(" Be brief. "),
        user("Hi"),
        assistant("Yes?\n"),
        user("Ünïcödé 日本 <b>&'\""),
    ],
    "long": [user("a"), assistant("<think>b</think>c"), user("d"), assistant(""), user("e")],
}


def chat_tokenizer() -> str:
    """With ChatML's two tokens, and no space in front of a text."""
    tokenizer = Tokenizer.from_str(byte_level_tokenizer(prefix=False))
    tokenizer.add_special_tokens(CONTROL)
    return str(tokenizer.to_str())


def _pieces(template: str, tokens: dict[str, str]) -> dict[str, str]:
    try:
        return chat_pieces(ChatTemplate(template, tokens, "template"))
    except ChatError:  # it is no template
        return {}


def chat_file(path: Path, template: str | None = CHATML, ends: bool = True, **options: Any) -> Path:
    """A model's file; everything about the model is random. Without `ends` no token ends an answer."""
    options = {"context": 512, "activations": "8"} | options
    model = random_model(tokenizer_json=chat_tokenizer(), tied=False, **options)
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    end = Tokenizer.from_str(model.tokenizer_json).token_to_id("<|im_end|>")
    write_gguf(
        path,
        replace(
            model,
            chat_template=template,
            special_tokens=tokens,
            chat_pieces={} if template is None else _pieces(template, tokens),
            eos_token_ids=[end, 2] if ends else [],
        ),
    )
    return path
