"""What tests of whole commands share: a shell, a small corpus, a small model folder."""

import re
import sys

import pytest
from hypothesis import settings

from models import tiny_model
from squat.checkpoints import save_model
from squat.cli import main
from squat.data import train_tokenizer, write_corpus

# How long an example takes says something about the machine, not about the code.
settings.register_profile("squat", deadline=None)
settings.load_profile("squat")


class Shell:
    """Runs the command line in this process: status, standard output, standard error."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def run(self, *args):
        self.monkeypatch.setattr(sys, "argv", ["squat", *map(str, args)])
        self.capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code or 0
        return (status, *self.capsys.readouterr())

    def succeed(self, *args):
        status, out, error = self.run(*args)
        assert status == 0, error
        return out

    def refuse(self, *args):
        """What it says to bad input: one message on standard error, status 2."""
        status, _, error = self.run(*args)
        assert status == 2, (status, error)
        (message,) = re.findall(r"squat: .*", " ".join(error.split()))
        return message


@pytest.fixture
def shell(monkeypatch, capsys):
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 400, seed=0)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(iter((corpus / "train/grammar.train").open()), vocab_size=400)
    save_model(tiny_model(vocab_size=len(tokenizer)), tokenizer, folder)
    return folder
