"""Where tokenized text is kept, and what happens where nothing can be."""

import os
import pwd
from pathlib import Path

import pytest

from squat.data.cache import cache_folder
from test_cli import recipe


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("SQUAT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_the_first_variable_that_is_set_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home/.cache/squat"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, which does not count")
    assert cache_folder() == tmp_path / "home/.cache/squat"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/squat"
    monkeypatch.setenv("SQUAT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQUAT_CACHE", "here")
    assert cache_folder() == tmp_path / "here"
    assert cache_folder("named") == Path("named")
    assert capsys.readouterr().err == ""


def nobody(monkeypatch):
    """As for a process whose user has no entry and no HOME."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert os.path.expanduser("~") == "~"


@pytest.mark.parametrize("reason", ["nobody", "file", "proc"])
def test_without_a_cache_it_works_and_says_so_once(
    shell, model, corpus, tmp_path, monkeypatch, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if reason == "nobody":
        nobody(monkeypatch)
    else:
        place = {"file": tmp_path / "file/cache", "proc": "/proc/squat"}[reason]
        monkeypatch.setenv("SQUAT_CACHE", str(place))
    command = ("eval", model, "--task", "perplexity", "--data", corpus / "dev")
    status, first, error = shell.run(*command, "--json", "-", "--sequence-length", 32)
    assert status == 0
    (line,) = [line for line in error.splitlines() if "squat" in line]
    assert "cannot be written" in line
    assert "set SQUAT_CACHE to a folder that can" in line
    status, second, error = shell.run(*command, "--json", "-", "--sequence-length", 32)
    assert (status, second) == (0, first)
    assert "cannot be written" not in error
    monkeypatch.setenv("SQUAT_CACHE", str(tmp_path / "cache"))
    assert shell.succeed(*command, "--json", "-", "--sequence-length", 32) == first
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "file"]


def test_a_home_folder_that_is_not_known_is_no_folder_of_that_name(
    shell, model, corpus, tmp_path, monkeypatch
):
    nobody(monkeypatch)
    file = recipe(tmp_path, model, corpus, output="~/run")
    assert "output: ~/run: no home folder is known" in shell.refuse("train", file)


def test_a_run_goes_on_whatever_the_cache_is_called_by_then(
    shell, model, corpus, tmp_path, monkeypatch
):
    data = {"train": str(corpus / "train"), "sequence_length": 16}
    file = recipe(tmp_path, model, corpus, data=data)
    for place in ("a", "b"):
        monkeypatch.setenv("SQUAT_CACHE", str(tmp_path / place))
        assert shell.run("train", file, "--max-minutes", 0)[0] == 3
        assert list((tmp_path / place).glob("text-*"))
    data["cache"] = str(tmp_path / "c")
    assert (
        shell.run("train", recipe(tmp_path, model, corpus, data=data), "--max-minutes", 0)[0] == 3
    )
