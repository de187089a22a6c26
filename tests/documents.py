"""Documents that are run: the code blocks of a Markdown file, one after another, in a folder of small things.

A block in `sh` is typed line by line, one in `python` is executed, and one with a title is that file. What is
not run stands behind a comment that says why:

    <!-- not run: needs the NDK -->

Paths, names and numbers are the document's own. What makes it small is what lies in the folder: a tiny model
under the names that documents give to the reader's (MODEL, path/to/model, ...), little text, recipes of a few
steps.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
_TITLE = re.compile(r'title="(.+?)"')
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands behind its fence, its text, where it is, and why it is not run."""

    language: str
    title: str | None
    text: str
    where: str
    not_run: str | None


def blocks_of(file: Path) -> list[Block]:
    """The fenced blocks of a document, in their order."""
    found, reason = [], None
    for token in MarkdownIt().parse(file.read_text()):
        if token.type == "html_block":
            comment = _NOT_RUN.search(token.content)
            reason = comment[1] if comment else None
        elif token.type == "fence":
            language, _, rest = token.info.partition(" ")
            title = _TITLE.search(rest)
            assert token.map is not None
            where = f"{file.name}:{token.map[0] + 1}"
            found.append(Block(language, title[1] if title else None, token.content, where, reason))
            reason = None
    return found


def lines_of(text: str) -> list[str]:
    """The commands of a block in `sh`: a line each, or several that end in a backslash."""
    whole = text.replace("\\\n", " ")
    return [line.strip() for line in whole.splitlines() if shlex.split(line, comments=True)]


class Reader:
    """Does what a document says, in the current folder.

    Args:
        squat: runs the program with these arguments, and lets an error pass as an exception.
        replace: what a document says -> what is done here, in every block.
    """

    def __init__(self, squat: Callable[..., object], replace: dict[str, str] | None = None) -> None:
        self.squat, self.replace = squat, replace or {}
        self.names: dict[str, Any] = {"__name__": "document"}

    def read(self, file: Path) -> None:
        """Run all blocks of a document."""
        for block in blocks_of(file):
            if block.not_run is None:
                self.run(block)

    def run(self, block: Block) -> None:
        """Run one block; a failure names the place."""
        text = block.text
        for said, done in self.replace.items():
            text = text.replace(said, done)
        try:
            if block.title is not None:
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(_small(text))
            elif block.language == "sh":
                for line in lines_of(text):
                    self.type(line)
            elif block.language == "python":
                exec(compile(text, block.where, "exec"), self.names)
            elif block.language not in ("text", "json"):
                raise AssertionError(f"nobody knows how to run {block.language!r}")
        except Exception as error:
            raise AssertionError(f"{block.where}: {error}") from error

    def type(self, line: str) -> None:
        """Do one line of a shell block."""
        words = shlex.split(os.path.expandvars(line), comments=True)
        said = {}
        while words and _ASSIGNMENT.match(words[0]):
            name, _, said[name] = words.pop(0).partition("=")
        before = dict(os.environ)
        os.environ |= said
        if not words:
            return  # it holds from here on
        try:
            if words[:2] == ["pip", "install"]:
                _check_requirement(words[2])
            elif words[0] == "make" and len(words) == 2:
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"no target {words[1]}"
            elif words[0] == "squat" and not set("|<>;&") & set("".join(words)):
                self.squat(*words[1:])
            else:
                _shell(line)
        finally:
            for name in said:
                os.environ.pop(name)
            os.environ |= {name: before[name] for name in said if name in before}


def _check_requirement(requirement: str) -> None:
    """What stands behind `pip install` is this project, with extras that there are."""
    name, _, extras = requirement.rstrip("]").partition("[")
    assert name in (".", "squat"), requirement
    there = metadata("squat").get_all("Provides-Extra") or []
    for extra in filter(None, extras.split(",")):
        assert extra in there, requirement


def _shell(line: str) -> None:
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, (
        f"{line}: {done.returncode}: {done.stderr.decode(errors='replace')}"
    )


def _small(text: str) -> str:
    """A recipe of a few steps."""
    return re.sub(r"\bsteps: \d+", "steps: 3", text)


def lay_out(folder: Path, model: Path, corpus: Path) -> None:
    """Put under the reader's names what documents speak of: models, texts, recipes."""
    (folder / "path/to").mkdir(parents=True)
    for name in ("MODEL", "path/to/model"):
        (folder / name).symlink_to(model)
    for name, part in {"text": "train", "held-out/text": "dev", "blimp": "pairs"}.items():
        place = folder / "path/to" / name
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(corpus / part)
    (folder / "path/to/squat").symlink_to(ROOT)
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        place = folder / recipe.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_small(recipe.read_text()))
