"""What happened to each request, exactly as measured, in columns that workers send to the master."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

PREDICT = "predict"  # the group of requests that objectives are about
SAMPLE = np.dtype(
    [
        ("due_s", "f8"),  # when the request was to start, seconds since the epoch
        ("lag_s", "f8"),  # how much later it started
        ("latency_s", "f8"),  # from when it was to start until the end of its answer
        ("name", "u4"), ("error", "u4"), ("model", "u4"), ("kind", "u4"),  # numbers of texts; 0 is none
        ("version", "i8"),  # that answered; 0 is unknown
        ("wanted", "i8"),  # that had to answer; 0 is any that its label stands for
        ("images", "u4"), ("right", "u4"),  # labelled images that were sent, and that were classified correctly
        ("is_predict", "?"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A finished request."""

    name: str
    due_s: float
    lag_s: float
    latency_s: float
    error: str = ""
    model: str = ""
    kind: str = ""
    version: int = 0
    wanted: int = 0
    images: int = 0
    right: int = 0
    is_predict: bool = False


@dataclass(frozen=True)
class Samples:
    """All requests of a run, in the order of their schedule, with what else was seen of the generator."""

    rows: np.ndarray  # (n,) SAMPLE
    texts: list[str]
    dropped_s: np.ndarray  # (d,) when arrivals were to start that the cap dropped, seconds since the epoch
    cpu: np.ndarray  # (t, 3): process, end of a second since the epoch, share of a core

    def of(self, mask: np.ndarray) -> "Samples":
        """Those requests only."""
        return replace(self, rows=self.rows[mask])

    @property
    def predictions(self) -> "Samples":
        """Those that ask for predictions."""
        return self.of(self.rows["is_predict"])

    def between(self, start_s: float, end_s: float) -> "Samples":
        """What was to start in this time, seconds since the epoch."""

        def within(times: np.ndarray) -> np.ndarray:
            return np.asarray((times >= start_s) & (times < end_s))

        return replace(
            self, rows=self.rows[within(self.rows["due_s"])], dropped_s=self.dropped_s[within(self.dropped_s)],
            cpu=self.cpu[within(self.cpu[:, 1])],
        )  # fmt: skip

    def text(self, column: str) -> np.ndarray:
        """The texts of a column, (n,)."""
        found: np.ndarray = np.asarray(self.texts, object)[self.rows[column]]
        return found

    @property
    def failed(self) -> np.ndarray:
        """Whether each request failed, (n,) bool."""
        failed: np.ndarray = self.rows["error"] != 0
        return failed

    def errors(self) -> dict[str, int]:
        """How often each error happened, the most frequent first."""
        return dict(Counter(self.text("error")[self.failed].tolist()).most_common())

    def busiest_cpu(self, window: int = 5) -> float:
        """The largest share of a core that a process used over `window` consecutive seconds, or over all if fewer."""
        highest = 0.0
        for process in np.unique(self.cpu[:, 0]):
            shares = self.cpu[self.cpu[:, 0] == process][:, 2]
            size = min(window, len(shares))
            highest = max(highest, float(np.convolve(shares, np.ones(size) / size, "valid").max()))
        return highest


class Recorder:
    """Collects outcomes; of one process, or of all workers in the master."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {"": 0}
        self._rows: list[tuple[Any, ...]] = []
        self._chunks: list[np.ndarray] = []
        self._dropped: list[float] = []
        self._cpu: list[tuple[float, float, float]] = []

    def _number(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def add(self, one: Outcome) -> None:
        """Record a finished request."""
        self._rows.append(
            (
                one.due_s, one.lag_s, one.latency_s, self._number(one.name), self._number(one.error),
                self._number(one.model), self._number(one.kind), one.version, one.wanted, one.images, one.right,
                one.is_predict,
            )
        )  # fmt: skip
        if len(self._rows) >= 10_000:  # tuples take ten times the memory
            self._pack()

    def drop(self, due_s: float) -> None:
        """Record an arrival that was not sent because too many requests were open."""
        self._dropped.append(due_s)

    def tick(self, process: int, at_s: float, cpu_share: float) -> None:
        """Record what share of a core a process used in the second before."""
        self._cpu.append((process, at_s, cpu_share))

    def _pack(self) -> None:
        self._chunks.append(np.array(self._rows, SAMPLE))
        self._rows = []

    def samples(self) -> Samples:
        """Everything so far."""
        self._pack()
        self._chunks = [np.concatenate(self._chunks)]
        rows = self._chunks[0]
        cpu = np.array(self._cpu, np.float64).reshape(-1, 3)
        return Samples(
            rows[np.argsort(rows["due_s"], kind="stable")], list(self._texts), np.sort(np.array(self._dropped, float)),
            cpu,
        )  # fmt: skip

    def take(self) -> dict[str, Any]:
        """Everything so far as a message, and forget it."""
        found = self.samples()
        self._chunks, self._dropped, self._cpu = [], [], []
        return {
            "rows": found.rows.tobytes(), "texts": found.texts, "dropped": found.dropped_s.tobytes(),
            "cpu": found.cpu.tobytes(),
        }  # fmt: skip

    def merge(self, message: Mapping[str, Any]) -> None:
        """Add what `take` of another recorder returned."""
        rows = np.frombuffer(message["rows"], SAMPLE).copy()
        numbers = np.array([self._number(text) for text in message["texts"]], np.uint32)
        for column in ("name", "error", "model", "kind"):
            rows[column] = numbers[rows[column]]
        self._chunks.append(rows)
        self._dropped += np.frombuffer(message["dropped"], np.float64).tolist()
        self._cpu += [
            (process, at_s, used) for process, at_s, used in np.frombuffer(message["cpu"]).reshape(-1, 3).tolist()
        ]


def share(part: float, whole: float) -> float:
    """`part` of `whole`; nan of nothing."""
    return part / whole if whole else math.nan
