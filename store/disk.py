"""A disk that is full or fails: how to recognize it, and a reserve that lets deletions go through."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from store.errors import StorageFailed, StorageFull

LOW_BYTES = 16 << 20  # with less than this free, uploads and fine-tunes are about to fail
RESERVE_BYTES = 1 << 20  # enough for SQLite's journal to record a deletion
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_SAID = ("database or disk is full", "No space left on device")  # by SQLite, and by TensorFlow


def is_full(failure: BaseException | None) -> bool:
    """Tell whether a failure of the file system, of SQLite or of PostgreSQL means that no space is left."""
    while failure is not None:
        if isinstance(failure, StorageFull) or (isinstance(failure, OSError) and failure.errno in _FULL):
            return True
        if isinstance(failure, sa.exc.DBAPIError):
            original = failure.orig
            if getattr(original, "sqlstate", None) == "53100":
                return True
        if any(text in str(failure).partition("\n")[0] for text in _FULL_SAID):
            return True
        failure = failure.__cause__
    return False


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise `StorageFull` for every failure that means it, and `StorageFailed` for others of the file system."""
    try:
        yield
    except Exception as exc:
        if is_full(exc) and not isinstance(exc, StorageFull):
            raise StorageFull("no space is left on the disk; delete models or free space, then try again") from exc
        if isinstance(exc, OSError):
            raise StorageFailed(f"the disk failed: {exc.strerror or exc}; the log has the file") from exc
        raise


def is_low(directory: Path) -> bool:
    """Tell whether the file system of `directory` is as good as full."""
    return shutil.disk_usage(directory).free < LOW_BYTES


class Reserve:
    """Space that is given back when a deletion needs some to be recorded at all."""

    def __init__(self, home: Path) -> None:
        self._path = home / "reserve"

    def keep(self) -> None:
        """Take the space, unless it is taken already or there is little left."""
        try:
            if self._path.exists() or is_low(self._path.parent):
                return
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError:
            self.release()

    def release(self) -> None:
        """Give it back."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
