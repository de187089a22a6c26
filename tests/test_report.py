"""The report: one file, complete, without a network; and how it looks in a browser."""

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser

import pytest

from squat.report.figures import comparison_figure
from squat.report.sections import Table, write_section

LOG = [
    {"step": step, "loss": 3.0 / step, "ce": 4.0 / step, "kl": 1.0, "wide_share": 0.5}
    for step in range(1, 40)
]
BLIMP = {
    "settings": {"data": ["blimp"], "limit": 9, "sequence_length": 128, "by_source": True},
    "average_fields": 0.701,
    "average_with_supplement": None,
    "average_paradigms": 0.69,
    "fields": {"binding": 0.7},
    "supplement": {},
}


@pytest.fixture
def run(tmp_path):
    """A folder as `squat sweep` leaves it for one run, with a section in it."""
    folder = tmp_path / "sweep/first/seed-0"
    folder.mkdir(parents=True)
    recipe = {
        "output": "out",
        "model": "models/small",
        "data": {"sequence_length": 128},
        "quantize": {"weight_bits": 4, "activation_bits": "4:8", "method": "lsq"},
        "training": {"batch_size": 8, "accumulate": 2},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "log.json").write_text(json.dumps({"seconds": 60, "log": LOG}))
    (folder / "measured.json").write_text(
        json.dumps(
            {
                "measured_in": "engine",
                "blimp": BLIMP,
                "perplexity": {
                    "settings": BLIMP["settings"]
                    | {"data": ["dev"], "limit": None, "by_source": False},
                    "loss": 3.5,
                    "perplexity": 33.1,
                },
            }
        )
    )
    (folder / "model.gguf").write_bytes(b"x" * 2_500_000)
    add_section(folder / "study")
    return folder


def add_section(folder, title="A study"):
    table = Table("Some numbers", ["model", "loss"], [["<b>first</b>", "3.50"]])
    drawn = comparison_figure("A figure", {"first": {"loss": 3.5}}, {"loss": "nats"})
    write_section(
        folder,
        title,
        "squat study --fast",
        "What it shows.",
        [table],
        {"bars": ("Bars", drawn)},
        [3.5],
    )


class Page(HTMLParser):
    """Text and addresses of a page; raises where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.addresses, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data.strip())


def test_a_run_becomes_one_file_with_everything_in_it(shell, run):
    shell.succeed("report", run)
    source = (run / "report.html").read_text()
    page = Page(source)
    outside = [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))]
    assert not outside
    assert "://" not in source
    text = " ".join(part for part in page.text if part)
    for expected in (
        "first/seed-0", "W4A4:8, lsq", "3.5000 nats", "33.10", "70.1", "2.50 MB", "50 %", "79,872",
        "binding", "A study", "<b>first</b>", "squat study --fast", "squat train recipe.yaml",
        "--task perplexity --data dev --sequence-length 128 --no-by-source",
        "--task blimp --data blimp --limit 9",
        "activation_bits: '4:8'",
    ):  # fmt: skip
        assert expected in text, expected
    figures = [a for a in page.addresses if a.startswith("data:")]
    assert len(figures) == 4 + 1  # loss, ce, kl, wide_share; the section's


def test_a_run_in_mid_training_has_a_report(shell, run):
    for name in ("log.json", "measured.json", "model.gguf"):
        (run / name).unlink()
    shell.succeed("report", run)
    assert "A study" in (run / "report.html").read_text()


def test_sections_from_elsewhere_are_included(shell, run, tmp_path):
    add_section(tmp_path / "elsewhere", "From elsewhere")
    out = tmp_path / "page.html"
    shell.succeed("report", run, "--include", tmp_path / "elsewhere", "--output", out)
    assert out.read_text().count("From elsewhere") == 2  # the heading, and the link to it
    assert not (run / "report.html").exists()


def summary(**measures):
    return {
        name: {"mean": value, "standard_deviation": 0.01, "seeds": 2}
        for name, value in measures.items()
    }


def test_a_sweep_becomes_tables_and_figures(shell, run):
    folder = run.parent.parent
    runs = {"full-precision": summary(loss=3.4), "not-yet": {}}
    for name, bits, loss in (("uniform-4", 4, 3.7), ("uniform-8", 8, 3.5), ("first", "4:8", 3.55)):
        share = {"wide_share": 0.4} if bits == "4:8" else {}
        runs[name] = summary(loss=loss, added=loss - 3.4, average_fields=60.0, **share)
        seed = folder / name / "seed-0"
        seed.mkdir(parents=True, exist_ok=True)
        (seed / "recipe.json").write_text(json.dumps({"quantize": {"activation_bits": bits}}))
    (folder / "table.json").write_text(json.dumps({"summary": runs, "rows": []}))
    shell.succeed("report", folder)
    page = Page((folder / "report.html").read_text())
    assert "3.5500 ± 0.0100" in page.text
    assert "A study" in page.text  # that of one of its runs
    for name in ("comparison.png", "mixed-widths.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_what_it_refuses(shell, run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no run of squat train" in shell.refuse("report", tmp_path / "empty")
    assert "holds no section" in shell.refuse("report", run, "--include", tmp_path / "empty")
    (run / "study/section.json").write_text('{"title": 1}')
    assert "not a section of a report" in shell.refuse("report", run)
    (run / "recipe.json").write_text("{")
    assert "recipe.json: cannot be read" in shell.refuse("report", run)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [500, 1200])
def test_it_fits_a_browser_window(shell, run, tmp_path, width):
    """Rendered without a network: no wider than the window, every picture decoded, nothing blank."""
    shell.succeed("report", run)
    page = run / "report.html"
    probe = (
        "<script>onload = () => { const found = document.body.dataset;"
        "found.wide = document.documentElement.scrollWidth - innerWidth;"
        "found.broken = [...document.images].filter(i => !i.naturalWidth).length; }</script>"
    )
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    common = [
        CHROMIUM,
        *FLAGS,
        f"--window-size={width},1600",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    dumped = subprocess.run(
        [*common, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert int(re.search(r'data-wide="(-?\d+)"', dumped)[1]) <= 0
    assert int(re.search(r'data-broken="(\d+)"', dumped)[1]) == 0
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*common, f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        check=True,
        timeout=300,
    )
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (width, 1600)
    assert shot.stat().st_size > 20_000  # a blank page is a tenth of it
