"""Connections to PostgreSQL that do not wait for ever."""

from typing import Any

import psycopg

ANSWER_S = 10.0  # most that a statement may take: a server that is frozen, or a table that is locked, says nothing


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives up when the server has not answered for `ANSWER_S`.

    Timeouts of TCP do not help where the server's kernel still acknowledges, nor does `statement_timeout`, which the
    server itself would have to keep.
    """

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait for the server, but not longer.

        Raises:
            psycopg.OperationalError: it has not answered; the connection is closed.
        """
        try:
            return super().wait(gen, interval, ANSWER_S if timeout is None else timeout)
        except psycopg.errors._WaitTimeout as exc:
            self.pgconn.finish()
            raise psycopg.OperationalError(f"the server has not answered within {ANSWER_S:g} s") from exc
