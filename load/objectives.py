"""What a run must fulfil, and whether it did."""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from load.confidence import percentile
from load.kit import LabelView
from load.samples import Samples, share
from load.settings import KINDS, LoadSettings


@dataclass(frozen=True)
class Objective:
    """A demand, what was measured, and whether that is enough. What cannot be measured is not."""

    name: str
    value: float  # nan if it could not be measured
    limit: float
    is_kept: bool
    unit: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON, which knows no nan."""
        return asdict(self) | {"value": None if math.isnan(self.value) else self.value}


def at_most(name: str, value: float, limit: float, unit: str = "") -> Objective:
    """An objective from above."""
    return Objective(name, value, limit, value <= limit, unit)


def at_least(name: str, value: float, limit: float, unit: str = "") -> Objective:
    """An objective from below."""
    return Objective(name, value, limit, value >= limit, unit)


def judge(samples: Samples, views: Sequence[LabelView], settings: LoadSettings) -> list[Objective]:
    """The objectives of a run of open arrivals.

    Latencies are those of all predictions that were sent, failed ones with the time until they failed. Arrivals that
    the cap dropped have no latency, and count as errors.
    """
    predictions = samples.predictions
    latency_ms = 1000 * predictions.rows["latency_s"]
    found = [
        at_most("p95", percentile(latency_ms, 0.95), settings.p95_ms, "ms"),
        at_most("p99", percentile(latency_ms, 0.99), settings.p99_ms, "ms"),
        at_most("errors", error_share(samples), settings.error_share, "share"),
        at_least("requests", int((~predictions.failed).sum()), settings.requests, "requests"),
    ]
    limits = (settings.accuracy, settings.noisy_accuracy, settings.adversarial_accuracy)
    reached = accuracies(samples)
    for kind, limit in zip(KINDS, limits, strict=True):
        if limit is not None:
            found.append(at_least(f"accuracy, {kind}", reached.get(kind, (0, 0, math.nan))[2], limit, "share"))
    found.append(at_most("version skew", len(skewed(samples, views, settings)), 0, "answers"))
    return found


def error_share(samples: Samples) -> float:
    """Failed and dropped requests as a share of all that were due; nan if there were none."""
    dropped = len(samples.dropped_s)
    return share(int(samples.failed.sum()) + dropped, len(samples.rows) + dropped)


def accuracies(samples: Samples) -> dict[str, tuple[int, int, float]]:
    """By kind of image: labelled images that were answered, those that were right, and their share."""
    kinds, answered = samples.text("kind"), ~samples.failed
    found = {}
    for kind in KINDS:
        rows = samples.rows[(kinds == kind) & answered]
        if len(rows):
            images, right = int(rows["images"].sum()), int(rows["right"].sum())
            found[kind] = (images, right, share(right, images))
    return found


def skewed(samples: Samples, views: Sequence[LabelView], settings: LoadSettings) -> list[str]:
    """Describe every answer of a version that it should not have come from.

    A request that had to be answered by one version (it named that, or `version` of the settings does) is skewed if
    another one answered. Any other may be answered by each version that its model's labels stood for from `skew_s`
    before it started until it was answered. So while no label moves, all answers of a model come from one version (or
    those that share its traffic by weight); and once a move was seen, requests that start `skew_s` later and still get
    the old version are skewed. Labels are read twice a second, and a move counts as seen from the answer that shows
    it; one that is taken back between two looks is not seen.
    """
    rows, models = samples.rows, samples.text("model")
    started = rows["due_s"] + rows["lag_s"]
    ended = rows["due_s"] + rows["latency_s"]
    asked, answered = [view.asked_s for view in views], [view.answered_s for view in views]
    found = []
    for number in np.flatnonzero(rows["version"] > 0).tolist():
        model, version, wanted = models[number], int(rows["version"][number]), int(rows["wanted"][number])
        if wanted:
            allowed = frozenset({wanted})
        else:
            first = max(0, bisect_right(answered, float(started[number]) - settings.skew_s) - 1)
            last = min(len(views) - 1, bisect_left(asked, float(ended[number])))
            seen = [view.versions[model] for view in views[first : last + 1] if model in view.versions]
            if not seen:
                continue  # not a model that is watched
            allowed = frozenset().union(*seen)
        if version not in allowed:
            found.append(f"{model}: version {version} answered, not {', '.join(map(str, sorted(allowed)))}")
    return found


def versions(samples: Samples) -> dict[str, dict[int, int]]:
    """How many answers came from each version of each model."""
    found: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    rows = samples.rows["version"] > 0
    for model, version in zip(samples.text("model")[rows], samples.rows["version"][rows].tolist(), strict=True):
        found[model][version] += 1
    return {model: dict(sorted(each.items())) for model, each in sorted(found.items())}


@dataclass(frozen=True)
class Generator:
    """Whether what was measured is the service, or the program that measures."""

    lag_p99_ms: float
    cpu_share: float  # of a core, the most that a process used over 5 s
    due: int  # arrivals that were scheduled
    dropped: int
    is_saturated: bool


def inspect_generator(samples: Samples, settings: LoadSettings) -> Generator:
    """The generator is saturated if requests start late, or if a process of it takes nearly a whole core."""
    lag_ms = percentile(1000 * samples.rows["lag_s"], 0.99)
    cpu = samples.busiest_cpu()
    dropped = len(samples.dropped_s)
    late = lag_ms > settings.lag_share * settings.p99_ms  # false for nan
    return Generator(lag_ms, cpu, len(samples.rows) + dropped, dropped, late or cpu > settings.cpu_share)
