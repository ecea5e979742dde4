"""Whether the store and the disk work, found out by using them."""

import logging
import threading
import time
from pathlib import Path

import sqlalchemy as sa

from store.disk import is_low
from store.engine import metadata

log = logging.getLogger("temper.store")

RECHECK_S = 5.0  # the integrity check of SQLite reads the whole file


class Notice:
    """Logs a failure when it begins, when it becomes another one, and when it ends: not every time that it is met."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.failure: str | None = None

    def failed(self, failure: BaseException) -> None:
        """Note a failure."""
        text = f"{type(failure).__name__}: {failure}".partition("\n")[0]
        if text != self.failure:
            log.error("%s: %s", self._what, text)
        self.failure = text

    def worked(self) -> None:
        """Note that it works."""
        if self.failure is not None:
            log.info("%s: works again", self._what)
        self.failure = None


class Health:
    """Checks the store and the disk, at most once in `RECHECK_S`."""

    def __init__(self, engine: sa.Engine, home: Path) -> None:
        self._engine, self._home = engine, home
        self._store, self._disk = Notice("the store"), Notice("the disk")
        self._checked_at = -RECHECK_S
        self._write_failed = False
        self._one_check = threading.Lock()

    def store_failed(self, failure: BaseException) -> None:
        """Note that a request could not use the store."""
        self._store.failed(failure)

    def check(self) -> None:
        """Check again, unless that was done in the last seconds or is being done; blocks."""
        if time.monotonic() < self._checked_at + RECHECK_S or not self._one_check.acquire(blocking=False):
            return
        try:
            self._checked_at = time.monotonic()
            self._check()
        finally:
            self._one_check.release()

    def _check(self) -> None:
        try:
            self._use_store()
            self._store.worked()
        except Exception as exc:
            self._store.failed(exc)
        try:
            low = is_low(self._home)
        except OSError as exc:
            self._disk.failed(exc)
        else:
            if low or self._write_failed:
                self._disk.failed(OSError("no space is left" if self._write_failed else "almost no space is left"))
            else:
                self._disk.worked()
            self._write_failed = self._write_failed and low  # a quota, or a burst that is over

    def note_full_disk(self) -> None:
        """Note that a request failed because no space is left."""
        self._write_failed, self._checked_at = True, -RECHECK_S

    @property
    def store_works(self) -> bool:
        """Tell whether every table could be read when it was last checked."""
        return self._store.failure is None

    @property
    def disk_has_space(self) -> bool:
        """Tell whether there was space when it was last checked."""
        return self._disk.failure is None

    def _use_store(self) -> None:
        """Read from every table, and have SQLite check its file; raises what goes wrong."""
        with self._engine.connect() as connection:
            for table in metadata.sorted_tables:
                connection.execute(sa.select(table).limit(1)).all()
        if self._engine.dialect.name != "sqlite":
            return
        # A connection of its own: those of the pool may have the pages that are damaged on disk in their caches.
        fresh = sa.create_engine(self._engine.url, poolclass=sa.NullPool)
        with fresh.connect() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if found != "ok":
            raise ValueError(f"SQLite's quick_check: {found}")
