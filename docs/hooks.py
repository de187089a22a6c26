"""What lets the same Markdown be read on a code host and as a site.

Links are written for the repository: from README.md to docs/, from docs/ to what lies beside it. Here the
pages outside of docs/ join the site under the names of `PAGES`, other files that pages link to are copied to
repository/, and links follow them there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "native/README.md": "engine.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""A page outside of docs/ -> its place in the site."""
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside of docs/, and the files that any page links to."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    pages = [file.abs_src_path for file in files.documentation_pages() if file.abs_src_path]
    for page in map(Path, pages):
        for link in _LINK.findall(page.read_text()):
            target = Path(os.path.normpath(page.parent / link))
            place = _place(target)
            if place.startswith("repository/") and place not in files.src_uris and target.is_file():
                files.append(File.generated(config, place, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the places that files have in the site."""
    source = Path(page.file.abs_src_path)
    here = os.path.dirname(page.file.src_uri)

    def placed(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / match[1]))
        return os.path.relpath(_place(target), here or ".")

    return _LINK.sub(placed, markdown)


def _place(target: Path) -> str:
    """Where a file of the repository is in the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    path = target.relative_to(ROOT).as_posix()
    return PAGES.get(path, f"repository/{path}")
