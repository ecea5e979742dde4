"""What happens to a job: its events in pages, or as server-sent events while they come."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel, Field, WithJsonSchema

from api.gateway import Gateway, gateway_of, key_of, tenant_of
from api.http.openapi import JobId, errors
from store.errors import InvalidRequest, Overloaded
from store.keys import Key
from trainer.jobs.events import Event, EventType
from trainer.jobs.records import FINISHED

router = APIRouter(tags=["fine-tune"])

LOOK_S = 0.25  # between looks for new events
KEEP_ALIVE_S = 15.0  # of silence after which a comment is sent, so that proxies keep the connection
MAX_STREAMS = 100
LARGEST = 2**31 - 1  # number of an event


class EventView(BaseModel):
    """Something that has happened to a job."""

    id: str = Field(description="The job's id and `seq`.", examples=["ftjob-0198c0ffee01a2b3c4d5e6-1"])
    object: Literal["fine_tuning.job.event"] = Field("fine_tuning.job.event", description="Kind of this object.")
    seq: int = Field(description="Its number: from 1, in the order in which things happened, without gaps.")
    created_at: float = Field(description="Unix seconds.")
    type: Annotated[str, WithJsonSchema({"type": "string", "enum": list(EventType.__args__)})] = Field(
        description="What has happened: a change of `status` or stage; a `preview` that is live; a `trial` of the "
        "search; the spec that it has `resolved`; an `epoch`; a `publishing` step; a further part of the `report`."
    )
    data: dict[str, Any] = Field(
        description="The particulars, as in the job; of one that is queued again also the `reason`."
    )

    @classmethod
    def of(cls, event: Event) -> "EventView":
        """The public face of an event record."""
        return cls(
            id=f"{event.job}-{event.seq}", seq=event.seq, created_at=event.at, type=event.type, data=event.data
        )  # fmt: skip


class EventList(BaseModel):
    """Events, oldest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[EventView] = Field(description="The events of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last `seq`.")


@router.get(
    "/finetune/{id}/events",
    response_model=EventList,
    responses={
        200: {
            "description": "A page; or with `Accept: text/event-stream` a stream, in which `event` is the type, `data` "
            "the same object as in a page, and `id` its `seq`. The stream ends when nothing more can happen, or when "
            "its key is revoked.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **errors(404, 422, 429, 503),
    },
)
async def list_events(
    request: Request,
    id: JobId,
    after: Annotated[int, Query(ge=0, le=LARGEST, description="Number of the last event that is known.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Maximum number of events of a page.")] = 100,
    accept: Annotated[str, Header(description="`text/event-stream` asks for a stream.")] = "",
    last_event_id: Annotated[str | None, Header(description="As `after`, when a stream is resumed.")] = None,
) -> Response:
    """The events of a job, oldest first, in a page or as they happen."""
    gateway = gateway_of(request)
    await asyncio.to_thread(gateway.jobs.get, id, tenant=tenant_of(request))
    if "text/event-stream" in accept:
        after = _number(last_event_id) if last_event_id else after
        if gateway.streams >= MAX_STREAMS:
            raise Overloaded(f"{MAX_STREAMS} clients follow jobs already; read pages, or try again later")
        return EventSourceResponse(_stream(gateway, id, after, key_of(request)), headers={"Cache-Control": "no-store"})
    found = await asyncio.to_thread(gateway.jobs.events, id, after=after, limit=limit + 1)
    page = EventList(data=[EventView.of(event) for event in found[:limit]], has_more=len(found) > limit)
    return JSONResponse(page.model_dump())


def _number(last_event_id: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", last_event_id) or int(last_event_id) > LARGEST:
        raise InvalidRequest(
            f"Last-Event-ID: {last_event_id[:20]!r} is not the number of an event", param="Last-Event-ID"
        )
    return int(last_event_id)


async def _stream(gateway: Gateway, job_id: str, after: int, key: Key | None) -> AsyncIterator[bytes]:
    """Server-sent events, up to the last that can happen, or until the key is revoked.

    Every look asks the store, so nothing depends on which gateway or worker wrote an event. Where the store fails the
    stream breaks off, and the client resumes it.
    """
    gateway.streams += 1
    try:
        silent_s = 0.0
        while gateway.keys.still_lets_in(key):
            job = await asyncio.to_thread(gateway.jobs.get, job_id)  # first: what ended it is then among the events
            found = await asyncio.to_thread(gateway.jobs.events, job_id, after=after)
            for event in found:
                after, silent_s = event.seq, 0.0
                data = EventView.of(event).model_dump_json()
                yield format_sse_event(data_str=data, event=event.type, id=str(event.seq))
            if job.status in FINISHED and job.report_status != "quick":
                return
            await asyncio.sleep(LOOK_S)
            silent_s += LOOK_S
            if silent_s >= KEEP_ALIVE_S:
                silent_s = 0.0
                yield KEEPALIVE_COMMENT
    finally:
        gateway.streams -= 1
