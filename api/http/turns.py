"""Places for predictions, which tenants share while several of them ask."""

import asyncio
import math
import time
from collections import deque

from store.errors import Overloaded

PLACES = 8  # predictions under way together, while more than one tenant asks; each has at least one
ACTIVE_S, LOOK_S = 1.0, 0.1  # how long a tenant without predictions counts as asking, and how often that is looked at
MAX_WAITING = 1000  # requests of a tenant


class Turns:
    """Bounds how many predictions of each tenant are under way, as long as there are others.

    The event loop works off what has arrived in the order of arrival: without bounds, whoever keeps a hundred requests
    under way is a hundred requests ahead of everybody else. What waits here has cost next to nothing, and its body is
    not read. A tenant that is alone is not bounded.
    """

    def __init__(self) -> None:
        self._asked_at: dict[str, float] = {}  # in time.monotonic(), by tenant
        self._looked_at = 0.0
        self._inside: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # none is empty

    def entered(self, tenant: str) -> bool:
        """Take a place, if there is one; `leave` gives it back."""
        now = time.monotonic()
        self._asked_at[tenant] = now
        inside = self._inside.get(tenant, 0)
        if len(self._asked_at) > 1 and inside >= self._share(now):
            return False
        self._inside[tenant] = inside + 1
        return True

    async def wait(self, tenant: str) -> None:
        """Wait for a place after `entered` has found none, and take it.

        Raises:
            Overloaded: too many requests of the tenant are waiting.
        """
        queue = self._waiting.setdefault(tenant, deque())
        if len(queue) >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} predictions of this tenant are waiting")
        place = asyncio.get_running_loop().create_future()
        queue.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it has just got its place
                self.leave(tenant)
            raise

    def leave(self, tenant: str) -> None:
        """Give a place back, to the tenant's next request."""
        inside = self._inside[tenant] - 1
        queue = self._waiting.get(tenant)
        if queue:
            share = self._share(time.monotonic())
            while queue and inside < share:
                place = queue.popleft()
                if not place.done():
                    place.set_result(None)
                    inside += 1
            if not queue:
                del self._waiting[tenant]
        if inside:
            self._inside[tenant] = inside
        else:
            del self._inside[tenant]

    def _share(self, now: float) -> float:
        """How many places each tenant has."""
        if now > self._looked_at + LOOK_S:
            self._looked_at = now
            self._asked_at = {
                tenant: at for tenant, at in self._asked_at.items() if at > now - ACTIVE_S or tenant in self._inside
            }
        tenants = len(self._asked_at)
        return math.inf if tenants < 2 else max(1, PLACES // tenants)
