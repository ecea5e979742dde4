"""The page: one small application in the browser, and what it asks about its key.

Its files need no key, since they say nothing about this service; what they ask for does.
"""

import functools
import gzip
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from api.gateway import gateway_of, key_of, tenant_of
from api.http.pages import APPLICATION
from store.errors import NotFound
from store.records import SCOPES

router = APIRouter(tags=["page"])

API = Path(__file__).parent.parent
UI, INDEX, STYLES = API / "ui", "index.html", "page.css"
VENDOR = UI / "vendor"  # as it came from its authors
SHEETS = [API / "report/templates/report.css", UI / "style.css", UI / "views.css", VENDOR / "uplot.css"]  # `STYLES`
BLOCK = re.compile(rb"^[ \t]*/\*.*?\*/\n?", re.MULTILINE | re.DOTALL)  # a comment that begins a line
LINE = re.compile(rb"^[ \t]*//.*\n|^\s+|(?<=[;{}(),]) // .*", re.MULTILINE)  # one to a line's end, or what is empty
SPACE = re.compile(rb"\s*([{};,>])\s*|(?<=:)\s+")  # that a style sheet does not need
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the page, in both forms in which it may travel."""

    plain: bytes
    packed: bytes  # by gzip
    kind: str
    etag: str


@functools.cache
def files() -> dict[str, File]:
    """Every file of the page by its path below `/ui`; style sheets as one, which is smaller."""
    paths = [path for path in UI.rglob("*") if path.suffix in KINDS and path not in SHEETS]
    texts = {path.relative_to(UI).as_posix(): _lean(path) for path in paths}
    texts[STYLES] = b"".join(map(_lean, SHEETS))
    return {name: _file(name, text) for name, text in texts.items()}


def _file(name: str, plain: bytes) -> File:
    digest = hashlib.sha256(plain).hexdigest()[:20]
    kind = f"{KINDS[Path(name).suffix]}; charset=utf-8"
    return File(plain, gzip.compress(plain, 9, mtime=0), kind, f'W/"{digest}"')


def _lean(path: Path) -> bytes:
    """A file of ours without comments, indentation and empty lines, a tenth of what travels."""
    text = path.read_bytes()
    if path.is_relative_to(VENDOR):
        return text
    text = LINE.sub(b"", BLOCK.sub(b"", text))
    return SPACE.sub(lambda found: found[1] or b"", text) if path.suffix == ".css" else text


class KeyView(BaseModel):
    """What the presented key may do. Where no key is required, everybody may do everything."""

    object: Literal["key"] = Field("key", description="Kind of this object.")
    required: bool = Field(description="Whether requests need a key.")
    name: str | None = Field(description="Name of the key; null where none is required.")
    tenant: str = Field(description="The tenant that requests act for.")
    scopes: list[str] = Field(description="Its scopes, with those that `admin` includes.", examples=[["predict"]])


@router.get("/key")
async def show_key(request: Request) -> KeyView:
    """What the presented key may do, so that a client can leave out what it may not."""
    key = key_of(request)
    return KeyView(
        required=gateway_of(request).keys.required,
        name=key.name if key else None,
        tenant=tenant_of(request),
        scopes=[scope for scope in SCOPES if key is None or key.allows(scope)],
    )


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """The page itself."""
    return _answer(request, INDEX)


@router.get("/ui/{path:path}", include_in_schema=False)
async def file(request: Request, path: str) -> Response:
    """A file of the page."""
    return _answer(request, path)


def _answer(request: Request, path: str) -> Response:
    """A file, unless the browser has it; it asks each time, so a new release shows at once."""
    found = files().get(path)
    if found is None:
        raise NotFound(f"the page has no file {path!r}", param="path")
    headers = {
        "Cache-Control": "no-cache", "ETag": found.etag, "Vary": "Accept-Encoding",
        "Content-Security-Policy": APPLICATION,
    }  # fmt: skip
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.packed, headers={**headers, "Content-Encoding": "gzip"}, media_type=found.kind)
    return Response(found.plain, headers=headers, media_type=found.kind)
