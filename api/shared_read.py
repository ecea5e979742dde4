"""Reading what others may have changed, once for all who ask at the same time."""

import asyncio
import time
from collections.abc import Awaitable, Callable


class SharedRead:
    """Calls `read`, one call at a time; callers that come during one share the next, which begins after they asked.

    Args:
        pause_s: least time from the beginning of a call to that of the next.
    """

    def __init__(self, read: Callable[[], Awaitable[None]], pause_s: float = 0.0) -> None:
        self._read, self._pause_s = read, pause_s
        self._lock, self._began_at = asyncio.Lock(), 0.0  # the latter in time.monotonic()
        self._next: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        """Return when a call that began after this one has ended; raises what it has raised."""
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        await asyncio.shield(self._next)

    async def _run(self) -> None:
        async with self._lock:
            if self._pause_s:
                await asyncio.sleep(max(0.0, self._began_at + self._pause_s - time.monotonic()))
            self._next = None  # callers from here on need to see what is written after this call began
            self._began_at = time.monotonic()
            await self._read()
