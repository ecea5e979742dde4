"""Requests that create something, sent again: each gets the answer of the first, and nothing is created twice.

A client says that requests are one and the same by an `Idempotency-Key`. OpenAI's clients send none, but count their
retries: a retry is recognized by what it sends, within the time in which the lost attempt can have been made.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Annotated

import sqlalchemy as sa
from fastapi import Header, Request, Response

from api.gateway import gateway_of, tenant_of
from store.errors import InvalidRequest
from trainer.jobs.answers import HEADER, KEPT_S, Answer, Attempt, Repeated

RETRY_COUNT = "x-stainless-retry-count"
RETRY_S = 900.0  # OpenAI's clients give up on an answer after 600 s, and wait a few before they try again

Note = Callable[[sa.Connection, Answer], None]  # writes the answer down in the transaction that creates
Create = Callable[[Note], Awaitable[Answer]]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias=HEADER,
        description="Names this request, in up to 255 printable characters without spaces. Sent again with the same "
        "key within 24 hours, it gets the same answer, and nothing is created again.",
    ),
]


async def once(request: Request, content: str, create: Create) -> Response:
    """Answer a request that creates something, unless it repeats one that has been answered: then as that was.

    Args:
        content: SHA-256 of what the request says.
        create: called to do so; has to pass on its answer in the transaction that creates.

    Raises:
        InvalidRequest: the key is not one.
        IdempotencyMismatch: it was that of another request.
    """
    attempt = await _attempt(request, content)
    if attempt is None:
        return _response(await create(lambda connection, answer: None))
    answers = gateway_of(request).answers
    while True:
        found = await asyncio.to_thread(answers.find, attempt)
        if found is not None:
            return _response(found)
        try:
            return _response(await create(lambda connection, answer: answers.record(connection, attempt, answer)))
        except Repeated:  # by a request that ran at the same time
            continue


async def _attempt(request: Request, content: str) -> Attempt | None:
    """The key of a request with the time from which it counts; None if nothing tells it from others."""
    said = hashlib.sha256(f"{request.method} {request.url.path} {content}".encode()).hexdigest()
    key, window_s, count = request.headers.get(HEADER), KEPT_S, request.headers.get(RETRY_COUNT)
    if key is not None:
        if not re.fullmatch(r"[!-~]{1,255}", key):
            raise InvalidRequest(
                f"{HEADER}: must be 1 to 255 printable characters without spaces, not {key[:40]!r}", param=HEADER
            )
    elif count is not None:
        # A first attempt is never a repeated one, but it may be overtaken by its own retry.
        key, window_s = f"retry of {said}", 0.0 if count == "0" else RETRY_S
    else:
        return None
    answers = gateway_of(request).answers
    return await asyncio.to_thread(answers.attempt, tenant_of(request), key, said, window_s=window_s)


def _response(answer: Answer) -> Response:
    headers = {"Location": answer.location} if answer.location else None
    return Response(answer.body, answer.status, headers, "application/json")
