"""The site is built without a warning, loads nothing from elsewhere, and all links lead somewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[2]
LOADED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md")


class Page(HTMLParser):
    """The links, anchors and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {str(given[name]) for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if tag in LOADED and given.get(LOADED[tag]) and given.get("rel") != "canonical":
            self.loaded.append(str(given[LOADED[tag]]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Every page of the site by its path, built in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(folder).as_posix(): Page(path.read_text("utf-8")) for path in folder.rglob("*.html")}
    assert len(pages) > 25
    missing = [
        f"{name}: {link}"
        for name, page in pages.items() if name != "404.html"
        for link in (*page.links, *page.loaded)
        if (found := _target(name, link)) is not None and not _exists(folder, pages, *found)
    ]  # fmt: skip
    assert missing == []
    return pages


def _target(page: str, link: str) -> tuple[str, str] | None:
    """The path and the anchor that a link of a page leads to; None for what is elsewhere."""
    path, anchor = urldefrag(urljoin(f"http://site/{page}", link))
    if not path.startswith("http://site/"):
        return None
    return unquote(path.removeprefix("http://site/")), unquote(anchor)


def _exists(folder: Path, pages: dict[str, Page], path: str, anchor: str) -> bool:
    if path == "" or path.endswith("/"):
        path += "index.html"
    if path not in pages:
        return (folder / path).is_file()
    return not anchor or anchor in pages[path].anchors


def test_the_site_is_built_without_a_warning_and_its_links_lead_somewhere(site: dict[str, Page]) -> None:
    links = [link for page in site.values() for link in page.links]
    assert len([link for link in links if "#" in link]) > 100


def test_the_site_loads_nothing_from_other_hosts(site: dict[str, Page]) -> None:
    assert [load for page in site.values() for load in page.loaded if re.match(r"(https?:)?//", load)] == []


def links(page: str) -> Iterator[tuple[str, str]]:
    """The paths and anchors of a page's links within the repository."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if ":" not in path:
            yield path, anchor


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", TOP)
def test_the_links_of_a_page_outside_of_the_site_lead_somewhere(page: str) -> None:
    for path, anchor in links(page):
        target = ROOT / path if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        assert not anchor or anchor in anchors(target), f"{page}: {path}#{anchor}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
