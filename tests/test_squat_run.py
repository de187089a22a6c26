"""squat-run, which has neither Python nor Jinja, says what Python says."""

import re
import subprocess
from pathlib import Path

import pytest

from chat_models import CHATML, GEMMA, LLAMA_3, TEMPLATES, ZEPHYR, chat_file, system, user
from squat import __version__
from squat.engine import Engine, hash_of

pytestmark = pytest.mark.slow

TEXT = "\u2003 What is\n\nthe capital of Ünïcödé 日本? "


@pytest.fixture(scope="module")
def squat_run(tmp_path_factory):
    """Builds it; the function runs it: status, standard output, standard error."""
    folder = tmp_path_factory.mktemp("squat-run")
    options = ["-DSQUAT_TESTS=OFF"]
    source = Path(__file__).parents[1]
    subprocess.run(["cmake", "-S", source, "-B", folder, *options], check=True, capture_output=True)
    build = ["cmake", "--build", folder, "-j", "2", "--target", "squat-run"]
    subprocess.run(build, check=True, capture_output=True)

    def run(*arguments):
        command = [folder / "squat-run", "-t", "1", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True)
        return done.returncode, *(o.decode(errors="replace") for o in (done.stdout, done.stderr))

    return run


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, GEMMA, ZEPHYR])
def test_it_answers_a_message(squat_run, tmp_path, template):
    file = chat_file(tmp_path / "tiny.gguf", template)
    engine = Engine(file, threads=1)
    options = ("-n", 12, "--chat", TEXT)
    for told in (None, " Be brief.\n"):
        messages = [user(TEXT)] if told is None else [system(told), user(TEXT)]
        asked = options if told is None else (*options, "--system", told)
        assert squat_run(file, *asked) == (0, engine.chat(messages, 12) + "\n", "")


def test_it_refuses_other_templates_by_name(squat_run, tmp_path):
    other = chat_file(tmp_path / "other.gguf", TEMPLATES["everything"])
    none = chat_file(tmp_path / "none.gguf", None)
    for file, says in [
        (other, "other.gguf is not of a kind that squat-run renders (such as ChatML"),
        (none, "none.gguf has no chat template; use -p"),
    ]:
        status, text, error = squat_run(file, "--chat", "Hello")
        assert (status, text) == (2, "")
        assert says in error
    status, _, error = squat_run(none, "-p", "Hello", "--chat", "Hello")
    assert status == 2
    assert "there is a prompt, too" in error


def test_its_hash_is_that_of_the_last_logits(squat_run, tmp_path):
    file = chat_file(tmp_path / "tiny.gguf", ends=False)
    status, _, error = squat_run(file, "-p", "Once", "-n", 6, "--stats")
    assert status == 0
    engine = Engine(file, threads=1)
    ids = engine.tokenize("Once")
    for _ in range(5):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    assert re.search(r"hash +(\w+)", error)[1] == hash_of(engine.logits(ids)[-1])
    assert re.search(r"decode +5 tokens, .* GB/s", error)
    assert squat_run("--version") == (0, f"squat-run {__version__}\n", "")
