"""What an attempt at a job leaves on disk for the next one, so that a worker that dies costs little.

A checkpoint saves work and decides nothing: what is worked out again from the same data, spec and seed is the same bit
for bit. So one that is missing or cannot be read or written is only logged.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog

from store.files import move

FORMAT = 2  # of the values in a checkpoint; a release that changes their meaning increments it
SHARE = 0.02  # of the time that saving may take
FIRST_S = 0.5  # less work than this is not worth a file
MOST_BYTES = 256 << 20  # of a file; only a search on very many images and classes has more to keep
RECORD = "record"

State = tuple[dict[str, np.ndarray], dict[str, Any]]  # float values exactly, and a record that JSON can hold

T = TypeVar("T")

log: structlog.stdlib.BoundLogger = structlog.get_logger("temper.worker")


class Checkpoint:
    """One file that is replaced again and again.

    Saving the 1.3 MB of a network, its optimizer and its best weights takes 4 ms on an SSD, and an epoch may take 30.
    So after it was saved in t seconds, it is saved no sooner than t / `SHARE` seconds later.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Keep the file in a directory that exists; without a path, nothing is kept."""
        self._path = path
        self._first_due = self._due = time.monotonic() + FIRST_S

    @classmethod
    def of(cls, folder: Path, name: str, *depends_on: Any) -> "Checkpoint":
        """The checkpoint that only what is worked out from the same values (JSON) finds again."""
        text = json.dumps([FORMAT, name, *depends_on], sort_keys=True)
        return cls(folder / f"{name}-{sha256(text.encode()).hexdigest()[:16]}.npz")

    def load(self) -> State | None:
        """What was saved last, by whatever process; None if there is nothing that can be read."""
        return self._read(lambda file: ({name: file[name] for name in file if name != RECORD}, _record(file)))

    def record(self) -> dict[str, Any] | None:
        """The record of what was saved last, without its values."""
        return self._read(_record)

    def _read(self, read: Callable[[Mapping[str, np.ndarray]], T]) -> T | None:
        if self._path is None or not self._path.exists():
            return None
        try:
            with self._path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return read(file)
        except Exception as exc:  # NumPy, zipfile and zlib raise nearly anything on a damaged file
            log.warning("ignoring a checkpoint that cannot be read", file=str(self._path), reason=repr(exc))
            return None

    def save(self, state: Callable[[], State], *, last: bool = False, now: bool = False) -> None:
        """Save what `state` returns, if it is time to, or `now`; the `last` state if the work is worth a file."""
        began = time.monotonic()
        if self._path is None or (began < (self._first_due if last else self._due) and not now):
            return
        arrays, record = state()
        arrays = {**arrays, RECORD: np.frombuffer(json.dumps(record).encode(), np.uint8)}
        if sum(array.nbytes for array in arrays.values()) > MOST_BYTES:
            return
        aside = self._path.with_suffix(f".{secrets.token_hex(4)}")
        try:
            with aside.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            move(aside, self._path)
        except OSError as exc:  # a full disk; or the job has ended, and its directory is gone
            log.warning("a checkpoint could not be saved", file=str(self._path), reason=str(exc))
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        ended = time.monotonic()
        self._due = ended + (ended - began) / SHARE


def _record(file: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file[RECORD].tobytes())
    return found
