"""Figures that benchmarks note for `make bench`, which collects them from a file."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "TEMPER_BENCH_FIGURES"  # names the file; without it nothing is noted


@dataclass(frozen=True)
class Figures:
    """What one side of a comparison took, or did in a second, in every round."""

    title: str  # of the comparison
    side: str
    values: list[float]
    unit: str  # "s" or "ms", of which less is better, or something a second
    is_alternative: bool  # what ours is compared with; the first one is what ratios refer to

    @property
    def less_is_better(self) -> bool:
        """Whether the values are times."""
        return self.unit in ("s", "ms")


def note(title: str, side: str, values: Sequence[float], unit: str, *, is_alternative: bool = False) -> None:
    """Note the figures of a side, one of each round."""
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Figures(title, side, list(values), unit, is_alternative))) + "\n")


def noted(path: Path) -> dict[str, list[Figures]]:
    """All figures that were noted in a file, by the title of the comparison."""
    found: dict[str, list[Figures]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        one = Figures(**json.loads(line))
        found.setdefault(one.title, []).append(one)
    return found
