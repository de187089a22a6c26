"""What reaches a terminal: tables that fit, lines where there is no bar, names as they are."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from squat import terminal
from squat.bench import Measurement, measurements_table, profile_table
from squat.evaluate.tasks import label_of
from test_cli import recipe


@pytest.fixture
def shown(monkeypatch, capsys):
    """A table as it is shown in a terminal of some width."""

    def lines(table, width):
        console = Console(width=width, markup=False, emoji=False, highlight=False)
        monkeypatch.setattr(terminal, "console", console)
        capsys.readouterr()
        terminal.show(table)
        return capsys.readouterr().out.splitlines()

    return lines


def words(table):
    """Every word and number of a table."""
    texts = [str(table.title), *(str(column.header) for column in table.columns)]
    texts += [str(cell) for column in table.columns for cell in column.cells]
    return {word for text in texts for word in text.split()}


def table(heads, *rows):
    made = Table(title="A title of some words")
    for head in heads:
        made.add_column(head)
    for row in rows:
        made.add_row(*row)
    return made


HEADS = ["model", "loss (nats/token)", "perplexity", "parameters of the model", "file, MB"]
ROWS = [
    [
        "SmolLM2-135M-Instruct-w4a8",
        "3.1234",
        "22.71",
        "134,515,008 of which 28,311,552 tied",
        "93.1",
    ],
    ["tiny", "10.5", "36,315.50", "1", "0.1"],
]


@pytest.mark.parametrize("width", [200, 100, 80, 70, 60, 40])
def test_no_word_is_cut_and_no_line_is_too_long(shown, width):
    wide = table(HEADS, *ROWS)
    lines = shown(wide, width)
    assert max(map(len, lines)) <= width
    found = set(re.sub(r"[│┃┏┓┡┩└┘┬┴┼━─┳╇╈╋├┤:]", " ", "\n".join(lines)).split())
    assert words(wide) <= found


def test_the_tables_of_the_benchmark_fit_80_columns(shown):
    rounds = [1234.5, 1235.5, 1236.5]
    measured = Measurement(
        "llama-58m", "avx512_vnni", 16, 4, 8, "4:8", 0.25, 128, 128, 123456.7, 1234.5, rounds, rounds,
        0.1234, 123_456_789, 123_456_789,
    )  # fmt: skip
    step = {
        "shape": "llama-58m", "isa": "avx512_vnni", "activations": "4:8=0.25", "threads": 16,
        "phase": "prefill", "step": "attention.scores", "share": 0.123, "ms": 1234.567, "gmacs": 123.4,
        "gbs": 12.3,
    }  # fmt: skip
    for made in (measurements_table([measured]), profile_table([step])):
        lines = shown(made, 80)
        assert max(map(len, lines)) <= 80
        assert len([line for line in lines if "│" in line]) <= 4  # as a table
        assert words(made) <= set(re.sub("[│┃]", " ", "\n".join(lines)).split())


def test_names_are_shown_as_they_are(shown):
    name = "runs/[bold]x[/bold]/:heart:"
    assert name in "\n".join(shown(table(["model"], [name]), 80))
    assert label_of(f"{name}/model").startswith(":heart:")


def test_a_terminal_without_line_drawing_has_tables(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="backslashreplace")
    monkeypatch.setattr(terminal, "console", Console(file=out, width=80, markup=False))
    terminal.show(table(["a"], ["≥ 99.9 %"]))
    out.flush()
    assert b"\\u2265 99.9 %" in out.buffer.getvalue()
    assert b"+--" in out.buffer.getvalue()


def test_without_a_terminal_a_line_now_and_then_says_how_far_work_is(monkeypatch, capsys):
    with terminal.progress("counting") as show:
        show(1, 2)
    assert capsys.readouterr().err == ""  # it took a moment
    clock = iter([0, 0, 1, 2, 4, 31, 34])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress("counting") as show:
        for done in (100, 120, 140, 160, 180):  # an earlier run has done 100
            show(done, 500)
    assert capsys.readouterr().err == (
        "counting: 120 of 500, 10/s, 0:00:38 left\ncounting: 180 of 500, 2.4/s, 0:02:16 left\n"
    )


def test_training_without_a_terminal_writes_no_bar(shell, tmp_path, model, corpus):
    status, out, error = shell.run("train", recipe(tmp_path, model, corpus))
    assert status == 0
    assert "\r" not in out + error
    assert "%|" not in out + error
    assert "'loss': " in out
