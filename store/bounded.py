"""Connections to PostgreSQL that do not wait for ever."""

from typing import Any, Self

import psycopg

STATEMENT_S = 10.0  # after which the server itself gives up a statement, which may wait for a lock
ANSWER_S = 15.0  # after which we do: a server that is frozen keeps no time


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives up when the server has not answered for `ANSWER_S`.

    Timeouts of TCP do not help where the kernel of a frozen server still acknowledges.
    """

    @classmethod
    def connect(cls, *arguments: Any, **options: Any) -> Self:
        """Connect, and tell the server how long a statement may take."""
        connection = super().connect(*arguments, **options)
        connection.execute(f"SET statement_timeout = {STATEMENT_S * 1000:.0f}")
        connection.commit()
        return connection

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
