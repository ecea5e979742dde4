"""What mkdocs does besides building docs/: pages from the top of the repository, and links that leave docs/.

Links in Markdown are those of the repository, so that they work wherever it is shown. On the site, a link to a page is
one to its place there, and a link to code, which the site does not have, is its text alone.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TOP = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from the top."""
    for name in TOP:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links where the pages are on the site."""
    source = page.file.src_uri if page.file.src_uri in TOP else f"docs/{page.file.src_uri}"
    return LINK.sub(lambda found: _moved(found, source, page.file.src_uri), markdown)


def _moved(found: re.Match[str], source: str, place: str) -> str:
    """A link of the page `source` as it is at `place` on the site."""
    text, target, anchor = found[1], found[2], found[3] or ""
    if ":" in target:
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path.startswith("docs/") or path in TOP or not (ROOT / path).exists():  # mkdocs warns of what does not exist
        path = path.removeprefix("docs/")
        return f"[{text}]({posixpath.relpath(path, posixpath.dirname(place) or '.')}{anchor})"
    return text
