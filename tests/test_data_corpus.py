"""Reading and cleaning: what real BabyLM files carry, and what a folder can get wrong."""

import gzip
import json
import os
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from squat.data import clean, corpus_files, read_corpus
from squat.data.cleaning import SOURCES
from squat.errors import DataError

EXAMPLES = [
    ("aochildes", "i think that's what i'm seeing .", "I think that's what I'm seeing."),
    ("aochildes", "hm , what is this ?", "hm, what is this?"),
    ("childes", "*MOT:\tlook! %add: FAT [background]", "look!"),
    ("childes", "*CHI: [makes noise].", ""),
    ("childes", "*CHI: xxx on here.", "on here."),
    ("childes", "*MOT: wha(t's) in the box [? there] now?", "what's in the box now?"),
    ("childes", "*MOT: (it')s that. = = = childes/UK/a_b.cha = = = [playing]", "it's that."),
    ("childes", "*INV: ⌊has⌋ a ↫s↫spider web.", "has a spider web."),
    ("childes", "*MOT: move it? [MOT pulls [the chair] back]", "move it?"),
    ("switchboard", "A: Uh-huh. Well, you know *listen", "Uh-huh. Well, you know"),
    ("switchboard_2023", "and the,  stuff like that.", "and the, stuff like that."),
    ("bnc_spoken", "Er,with some friends , you see .", "Er, with some friends, you see."),
    ("bnc_spoken", "Yeah,. to keep me going,?", "Yeah. to keep me going?"),
    ("cbt", "_BOOK_TITLE_ : Lucy_Maud_Montgomery___Rilla", ""),
    ("cbt", "`` I do n't , '' said the king 's son .", "\"I don't,\" said the king's son."),
    ("cbt", "He ca n't come -LRB- yet -RRB- .", "He can't come (yet)."),
    ("cbt", "` Yes , ' said Peter , ` and you ? '", "'Yes,' said Peter, 'and you?'"),
    ("cbt", "-LSB- Illustration : THE TOWER -RSB- * * * * * It was late .", "It was late."),
    ("children_stories", "82 Gambling Hansel ", "Gambling Hansel"),
    ("children_stories", "“It won’t man[oe]uvre,” said he.[5]", '"It won\'t manoeuvre," said he.'),
    (
        "gutenberg",
        "I _did_ see it. [Illustration: THE SEA] And you? {xiv}",
        "I did see it. And you?",
    ),
    ("gutenberg", "Distributed Proofreading Team at http://www.pgdp.net (This", ""),
    ("open_subtitles", "(SNORING) We'II wait. - No. -Yes.", "We'll wait. No. Yes."),
    ("open_subtitles", "{\\pos(192,220)}- l'm here, l am.", "I'm here, I am."),
    ("open_subtitles", "♪ My funny valentine ♪ â\x99a", "My funny valentine"),
    ("open_subtitles", "RUSTY: I �m not [sighs] late, Mr. 3#", "I'm not late, Mr. 3"),
    ("open_subtitles", "Àú1⁄2oÆ3⁄4 Ã ö1⁄2o(Å© ®1⁄2o", ""),
    ("qed", "So &quot;why&quot; -- (Laughter)", 'So "why" --'),
    ("simple_wiki", "Bure (; born 1971) &amp; Co. () is", "Bure (born 1971) & Co. is"),
    ("simple_wiki", 'Greek "enantios" ("����") x', 'Greek "enantios" x'),
    ("simple_wiki", "Statistics. 10||2||1||0 formula_9 End.&lt;br&gt;", "Statistics. End."),
    ("wikipedia", " = = = Early life = = = ", "Early life"),
    (None, "  Tabs\tand   spaces — “kept” quotes  ", "Tabs and spaces — “kept” quotes"),
    (None, "TomÃ¡s saidâ€” â€œitâ€™s fine", "Tomás said— “it’s fine"),
    (None, "*MOT: as it is", "*MOT: as it is"),
    (None, "* * *", ""),
]


def gzipped(data: bytes) -> bytes:
    """The same bytes every time: they stand in the names of tests, which two processes must agree on."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(("source", "line", "expected"), EXAMPLES)
def test_examples(source: str | None, line: str, expected: str) -> None:
    assert clean(line, source) == expected


@given(st.text(), st.sampled_from([None, *SOURCES]))
def test_a_cleaned_line_is_empty_or_has_text(line: str, source: str | None) -> None:
    cleaned = clean(line, source)
    assert cleaned == " ".join(cleaned.split())
    assert not cleaned or any(c.isalnum() for c in cleaned)


@given(st.text())
@example("Â\x1f¡")
def test_general_cleaning_settles(line: str) -> None:
    assert clean(clean(line)) == clean(line)


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n\n  \n")
    (tmp_path / "a.md").write_text("first\r\n", newline="")
    (tmp_path / "c.train").write_text("\ufeffthird", encoding="utf-8")
    (tmp_path / "ignored.json").write_text("{}")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert list(read_corpus(tmp_path)) == ["first", "second", "third"]


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("only this\n")
    assert list(read_corpus(tmp_path / "notes")) == ["only this"]


def test_sources_are_known_by_their_stems(tmp_path: Path) -> None:
    for name in ("childes.train", "my-childes.train"):
        (tmp_path / name).write_text("*MOT: hello [waves].\n")
    assert list(read_corpus(tmp_path)) == ["hello.", "*MOT: hello [waves]."]
    assert list(read_corpus(tmp_path, by_source=False)) == ["*MOT: hello [waves]."] * 2


def test_reading_counts_every_byte(tmp_path: Path) -> None:
    text = "Größe\n\n* * *\nmore\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    counts: list[int] = []
    list(read_corpus(tmp_path, on_read=counts.append))
    assert sum(counts) == len(text.encode())


def test_lines_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n" * 100_000 + b"\xff\n")
    assert list(islice(read_corpus(tmp_path), 3)) == ["good"] * 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no text file"),
        ({"a.txt": b"\n  \n\xef\xbb\xbf\n"}, "no text in 1 file"),
        ({"a.txt": b"fine\n" * 9 + b"caf\xe9\n"}, r"a\.txt: not UTF-8 after line .*0xe9.*iconv"),
        ({"train/a.txt": b"x", "dev/a.txt": b"x"}, "name one of its folders: dev, train"),
    ],
)
def test_folders_that_hold_no_corpus(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_corpus(tmp_path))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        list(read_corpus(tmp_path / "nowhere"))


@pytest.mark.skipif("SQUAT_DATA" not in os.environ, reason="SQUAT_DATA is not set")
def test_real_files_keep_their_text_and_lose_their_marks() -> None:
    marks = {
        "childes": ("*MOT:", "*CHI:", "[", "xxx", "= = =", "%add"),
        "switchboard": ("A: ", "B: "),
        "cbt": ("_BOOK_TITLE_", "``", "-LRB-", " n't"),
        "open_subtitles": ("♪", "[", "{", "\ufffd"),
        "simple_wiki": ("||", "&amp;", "()", "\ufffd"),
        "gutenberg": ("_", "pgdp", "[Illustration"),
    }
    for file in corpus_files(Path(os.environ["SQUAT_DATA"]) / "babylm" / "dev"):
        source = file.name.split(".")[0]
        raw = file.read_text("utf-8")
        lines = list(read_corpus(file))
        letters = sum(c.isalpha() for line in lines for c in line)
        # A fifth of CHILDES is speakers' names and notes; elsewhere next to nothing goes.
        least = 0.7 if source == "childes" else 0.95
        assert letters >= least * sum(c.isalpha() for c in raw), source
        for mark in marks.get(source, ()):
            assert not [line for line in lines if mark in line], (source, mark)


# --- texts in fields, tables and compressed files ---

RECORDS = [{"text": "first\nsecond", "n": 1}, {"text": None, "n": 2}, {"text": "Größe", "n": 3}]
LINES = ["first", "second", "Größe"]


def as_jsonl(field: str = "text") -> bytes:
    renamed = [{field: record["text"], "n": record["n"]} for record in RECORDS]
    return "\n\n".join(json.dumps(record) for record in renamed).encode()


def write_parquet(file: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(RECORDS)
    parquet.write_table(table, file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", gzipped("\n".join(LINES).encode())),
        ("a.train.gz", gzipped(b"first\nsecond\n") + gzipped("Größe".encode())),
        ("a.jsonl", as_jsonl()),
        ("a.jsonl.gz", gzipped(as_jsonl())),
    ],
)
def test_compressed_files_and_fields(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    counts: list[int] = []
    assert list(read_corpus(tmp_path, on_read=counts.append)) == LINES
    assert sum(counts) == len(content)
    assert list(read_corpus(tmp_path / name)) == LINES


def test_tables(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    counts: list[int] = []
    assert list(read_corpus(tmp_path, on_read=counts.append)) == LINES
    assert counts == [(tmp_path / "a.parquet").stat().st_size]


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.select([2, 0, 1]).save_to_disk(str(tmp_path / "one"), num_shards=2)
    (tmp_path / "one/cache-0.arrow").write_text("what a map left")
    assert list(read_corpus(tmp_path / "one")) == ["Größe", "first", "second"]
    datasets.DatasetDict({"dev": dataset, "train": dataset}).save_to_disk(str(tmp_path / "two"))
    assert list(read_corpus(tmp_path / "two/train")) == LINES
    with pytest.raises(DataError, match="name one of its folders: dev, train"):
        list(read_corpus(tmp_path / "two"))
    (tmp_path / "one/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json: not the state of a saved dataset"):
        list(read_corpus(tmp_path / "one"))


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl("story"))
    assert list(read_corpus(tmp_path, field="story")) == LINES
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: no field 'text', but 'story', 'n'; name .*data\.field"
    ):
        list(read_corpus(tmp_path))
    write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: no field 'story', but 'text', 'n'; name"):
        list(read_corpus(tmp_path / "b.parquet", field="story"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt.gz",
            gzipped(b"word " * 5000)[:-20],
            r"not a complete gzip file after line \d",
        ),
        ("a.txt.gz", b"plain text", "not a complete gzip file after line 0"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b'["a"]', r"a\.jsonl:1: a JSON list, not an object"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field 'text' is a int, not a text"),
        (
            "a.jsonl",
            b'{"text": "\\ud83d!"}',
            r":1: field 'text': character 1 is U\+D83D, half of a",
        ),
        ("a.parquet", b"PAR1 cut short", r"not a complete \.parquet file after row 0"),
        ("a.arrow", b"cut short", r"not a complete \.arrow file after row 0"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith((".parquet", ".arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_corpus(tmp_path))
    assert "\n" not in str(error.value)


def test_without_pyarrow_a_table_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"a\.parquet: reading \.parquet needs pyarrow: pip install"
    ):
        list(read_corpus(tmp_path))
