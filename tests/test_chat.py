"""Conversations: the engine reads what is new, `squat chat` says it; what cannot go on says how it can."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_models import CHATML, CONVERSATIONS, assistant, chat_file, system, user
from squat.engine import Engine
from squat.errors import EngineError

SAMPLED = {"temperature": 1.2, "seed": 5}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("chat") / "m.gguf")


@pytest.fixture(scope="module")
def engine(file: Path) -> Engine:
    return Engine(file, threads=1)


@pytest.fixture
def chat(shell, monkeypatch):
    """`squat chat` with lines on standard input: status, output, errors."""

    def run(file, *lines, options=("--max-new-tokens", 12)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return shell.run("chat", file, *options)

    return run


def test_a_conversation_continues_as_if_it_were_read_anew(file: Path) -> None:
    for kind in ("8", "4:8", "4"):
        path = chat_file(file.parent / f"{kind[0]}.gguf", activations=kind, margins=(0, 1))
        kept, messages, before = Engine(path, threads=1), [system("Be brief.")], 0
        for turn in range(3):
            messages.append(user(f"Message {turn}?"))
            answer = kept.chat(messages, 10, stream=True, **SAMPLED)
            text = "".join(answer)
            assert text == Engine(path, threads=1).chat(messages, 10, **SAMPLED)
            assert answer.prompt_tokens == len(kept.chat_tokens(messages))
            # What ended the prompt before may be merged with what was said behind it.
            assert max(before - 1, 0) <= answer.reused_tokens < answer.prompt_tokens
            before = answer.prompt_tokens
            messages.append(assistant(text))
        again = kept.chat(messages[:2], 10, stream=True, **SAMPLED)  # an older turn, once more
        assert "".join(again) == messages[2]["content"]
        assert again.reused_tokens == again.prompt_tokens - 1


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_was_done_before_a_prompt_gets_its_own_text(engine: Engine, data) -> None:
    prompts = [engine.chat_tokens(CONVERSATIONS[name]) for name in ("one", "system", "long")]
    expected = [engine.generate(ids, 5) for ids in prompts]
    for _ in range(5):
        which = data.draw(st.sampled_from(range(3)))
        match data.draw(st.sampled_from(["all", "some", "decode", "rewind", "score", "logits"])):
            case "all":
                assert engine.generate(prompts[which], 5) == expected[which]
            case "some":
                next(engine.generate(prompts[which], 5, stream=True), None)
            case "decode":
                engine.decode(which + 5)
            case "rewind":
                engine.rewind(engine._native.length() // 2)
            case "score":
                engine.score(["ab"])
            case "logits":
                engine.logits(prompts[which][:9])
    assert [engine.generate(ids, 5) for ids in prompts] == expected


def test_a_call_in_between_ends_a_stream(engine: Engine) -> None:
    for call in (
        lambda: engine.decode(7),
        lambda: engine.rewind(2),
        lambda: engine.chat([user("b")], 1),
    ):
        stream = engine.chat([user("a")], 40, stream=True)
        next(stream)
        call()
        with pytest.raises(EngineError, match="another call has used this engine"):
            list(stream)


def test_stop_strings_end_an_answer_across_tokens(engine: Engine) -> None:
    whole = engine.chat([user("a")], 40, **SAMPLED)
    for begin, length in ((0, 1), (4, 6), (9, 3), (len(whole) - 2, 2)):
        stop = whole[begin : begin + length]
        answer = engine.chat([user("a")], 40, stream=True, stop=["never", stop], **SAMPLED)
        assert "".join(answer) == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop"
    answer = engine.generate(
        engine.chat_tokens([user("a")]), 40, stream=True, stop=["\0"], **SAMPLED
    )
    assert "".join(answer) == whole
    assert answer.finish_reason == "length"
    assert answer.new_tokens == 40


def test_any_of_several_end_tokens_ends_an_answer(tmp_path: Path) -> None:
    from dataclasses import replace

    from engine_models import random_model
    from squat.deploy.gguf import write_gguf

    model = random_model(context=512, tied=False)
    write_gguf(tmp_path / "a.gguf", replace(model, chat_template=CHATML))
    free = Engine(tmp_path / "a.gguf", threads=1)
    ids = free.chat_tokens([user("a")])
    said = [int(free.prefill(ids).argmax())]
    while len(said) < 12:
        said.append(int(free.decode(said[-1]).argmax()))
    end = next(token for token in said[2:] if token not in said[:2])
    ends = {"chat_template": CHATML, "eos_token_ids": [2, 0, end]}
    write_gguf(tmp_path / "b.gguf", replace(model, **ends))
    answer = Engine(tmp_path / "b.gguf", threads=1).chat([user("a")], 12, stream=True)
    list(answer)
    assert (answer.finish_reason, answer.new_tokens) == ("stop", said.index(end))


def test_answers_end_with_the_context(file: Path) -> None:
    engine = Engine(file, threads=1, context=100)
    answer = engine.chat([user("a")], stream=True)
    list(answer)
    assert answer.prompt_tokens + answer.new_tokens == 101  # the last one is not read
    assert answer.finish_reason == "length"
    with pytest.raises(EngineError, match=r"prompt: its \d+ tokens exceed the context of 100"):
        engine.chat([user("long " * 100)])


def test_the_terminal_says_what_the_engine_says(chat, file: Path, engine: Engine, tmp_path) -> None:
    kept = tmp_path / "kept.json"
    options = ("--system", "Be brief.", "--max-new-tokens", 9, "--temperature", 0.9, "--seed", 3)
    status, out, error = chat(
        file, "Hello", "", "Again?", f"/save {kept}", "/reset", "Again?", "/quit", "not read",
        options=options,
    )  # fmt: skip
    messages = [system("Be brief.")]
    for text in ("Hello", "Again?"):
        messages.append(user(text))
        messages.append(assistant(engine.chat(messages, 9, temperature=0.9, seed=3)))
    alone = engine.chat([messages[0], user("Again?")], 9, temperature=0.9, seed=3)
    assert (status, error) == (0, "")
    said = [messages[2]["content"], messages[4]["content"], f"{kept}: 5 messages", alone]
    assert out == "".join(f"{text}\n" for text in said)
    assert json.loads(kept.read_text()) == messages
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_a_command_that_is_none_and_a_message_that_is_no_text(chat, file: Path, tmp_path) -> None:
    for line, message in (
        ("/rest", "squat: /rest: no such command; /reset begins anew, /save FILE"),
        ("/save", "squat: /save: no such command"),
        (f"/save {tmp_path}", f"squat: {tmp_path}: is a folder; name a file"),
        ("caf\udce9", "squat: messages: element 0: content: character 4 is the byte 0xe9"),
    ):
        status, out, error = chat(file, line, "Hello")
        assert status == 0
        assert error.startswith(message)
        assert error.count("\n") == 1
        assert out == chat(file, "Hello")[1]


def test_a_full_context_says_what_to_do(chat, file: Path, tmp_path) -> None:
    path = chat_file(tmp_path / "m.gguf", context=100)
    status, out, error = chat(path, "Hello", "Hello", "/reset", "Hello", options=())
    first, second = error.splitlines()[:2]
    assert first.startswith(
        "squat: the context of 100 tokens is full, and the answer ends here: /save"
    )
    assert "tokens with this message, and the context is 100: /save FILE keeps it" in second
    answer = Engine(path, threads=1).chat([user("Hello")])
    assert (status, out) == (0, f"{answer}\n{answer}\n")


def test_a_conversation_may_forget_its_beginning(chat, tmp_path) -> None:
    """What is read is the system's message, and as many of the last messages as leave room for an answer."""
    path = chat_file(tmp_path / "m.gguf", context=100)
    said = [f"Hello {i}" for i in range(6)]
    kept = tmp_path / "kept.json"
    options = ("--system", "Be.", "--forget", "--max-new-tokens", 9)
    status, out, error = chat(path, *said, f"/save {kept}", options=options)
    assert (status, error) == (0, "")
    assert out.endswith(f"{kept}: 13 messages\n")
    messages, shortened = json.loads(kept.read_text()), 0
    engine = Engine(path, threads=1)
    for end in range(2, 13, 2):
        tails = [[messages[0], *messages[begin:end]] for begin in range(1, end, 2)]
        fitting = [tail for tail in tails if len(engine.chat_tokens(tail)) + 9 <= 100]
        assert messages[end]["content"] == engine.chat(fitting[0], 9)
        assert messages[end]["content"] == engine.chat(messages[:end], 9, forget=True)
        shortened += fitting[0] != tails[0]
    assert 1 < shortened < 6
    status, _, error = chat(path, "Hello", "Hello", options=("--forget",))
    assert error.count("and the answer ends here: the next message has room again") == 2


def test_bad_input_ends_before_the_first_message(chat, shell, file: Path, model, tmp_path) -> None:
    without = chat_file(tmp_path / "without.gguf", None)
    raising = chat_file(tmp_path / "raising.gguf", "{{ raise_exception('No system!') }}")
    for source, options, expected in (
        (without, (), "without.gguf: has no chat template"),
        (raising, ("--system", "a"), "raising.gguf: chat template: No system!; give the messages"),
        (file, ("--top-p", 0), "top_p is 0"),
        (file, ("--system", "\udce9"), "element 0: content: character 1 is the byte 0xe9"),
        (model, (), "give the path of a .gguf file"),
        (tmp_path / "none.gguf", (), "none.gguf"),
    ):
        status, out, error = chat(source, "Hello", options=options)
        assert (status, out) == (2, "")
        assert expected in " ".join(error.split())


def test_ctrl_c_ends_the_answer_only(file: Path) -> None:
    path = chat_file(file.parent / "long.gguf", ends=False, context=60_000)
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from squat.cli import main\n"
        "sys.argv = ['squat', 'chat', sys.argv[1]]\n"
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        kept = file.parent / "kept.json"
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        said = os.read(process.stdout.fileno(), 20)  # it is in the midst of it
        process.send_signal(signal.SIGINT)
        process.stdin.write(f"/save {kept}\n/quit\n".encode())
        process.stdin.flush()
        rest, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (0, b"")
    messages = json.loads(kept.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    shown, end = (said + rest).decode(), f"\n{kept}: 2 messages\n"
    assert shown.endswith(end)
    # What was on its way to the terminal may be kept and not shown: a token.
    assert messages[1]["content"].startswith(shown.removesuffix(end))
    assert len(messages[1]["content"]) - len(shown.removesuffix(end)) < 8


def test_talking_loads_neither_torch_nor_transformers(file: Path) -> None:
    code = (
        "import io, sys; sys.stdin = io.StringIO('Hello'); from squat.cli import app\n"
        "app(['chat', sys.argv[1], '--max-new-tokens', '2'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
