"""What a run found: a table for people, `summary.json` for programs, `seconds.csv`, and `report.html` with charts."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import click
import numpy as np

from load.confidence import percentile
from load.objectives import Generator, Objective, accuracies, inspect_generator, versions
from load.samples import Samples, share
from load.settings import LoadSettings

FORMAT = 1  # of summary.json; grows when a field changes its meaning
KEPT, MISSED, AWAY, INVALID = 0, 1, 3, 4  # exit codes; 2 is wrong usage
PERCENTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class Step:
    """A rate that a search has tried."""

    rate: float  # asked for, in requests a second
    answered_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    failed: int
    dropped: int
    is_kept: bool
    is_saturated: bool
    why: str

    @classmethod
    def of(cls, rate: float, is_kept: bool, is_saturated: bool, why: str, samples: Samples) -> "Step":
        """From what was measured at this rate."""
        rows = samples.rows
        ended = rows["due_s"] + rows["latency_s"]
        took_s = float(ended.max() - rows["due_s"].min()) if len(rows) else math.nan
        p50, p95, p99 = (1000 * percentile(rows["latency_s"], each) for each in (0.5, 0.95, 0.99))
        failed = int(samples.failed.sum())
        return cls(
            rate, share(len(rows) - failed, took_s), p50, p95, p99, failed, len(samples.dropped_s), is_kept,
            is_saturated, why,
        )  # fmt: skip

    @property
    def text(self) -> str:
        """In one line."""
        verdict = "the generator is saturated" if self.is_saturated else "kept" if self.is_kept else "missed"
        why = f" ({self.why})" if self.why else ""
        return f"{self.rate:.4g}/s: p50 {self.p50_ms:.1f}, p99 {self.p99_ms:.1f} ms, {verdict}{why}"


@dataclass
class Run:
    """A scenario that has ended, and what it found."""

    scenario: str
    settings: LoadSettings
    samples: Samples
    began_s: float  # seconds since the epoch
    ended_s: float
    objectives: list[Objective]
    grown: dict[str, tuple[float, float]] | None  # count and sum that the server's histograms grew by
    notes: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    is_closed: bool = False  # requests are due before the generator means to start them, so that lag says nothing
    is_saturated: bool | None = None  # None: as the samples say

    @property
    def generator(self) -> Generator:
        """The state of the program that measured."""
        found = inspect_generator(self.samples, self.settings)
        if self.is_closed:
            found = Generator(math.nan, found.cpu_share, found.due, found.dropped,
                              found.cpu_share > self.settings.cpu_share)  # fmt: skip
        if self.is_saturated is not None:
            found = Generator(found.lag_p99_ms, found.cpu_share, found.due, found.dropped, self.is_saturated)
        return found

    @property
    def verdict(self) -> str:
        """`kept`, `missed`, or `invalid` if the generator was saturated: then no figure is about the service."""
        if self.generator.is_saturated:
            return "invalid"
        return "kept" if all(one.is_kept for one in self.objectives) else "missed"

    @property
    def exit_code(self) -> int:
        """0 if all objectives are kept, 1 if one is missed, 4 if the run is invalid."""
        return {"kept": KEPT, "missed": MISSED, "invalid": INVALID}[self.verdict]

    def server_ms(self) -> dict[str, float] | None:
        """Where the mean time of a prediction went, in ms, from the growth of the gateway's histograms.

        `queue` is the wait for a call, `model` the call to the model server, `gateway` the rest of the time from the
        request's head to the end of its response, `network` all that the generator saw beyond that. A call carries
        `batch_images` images on average.
        """
        if not self.grown or not self.grown["temper_request_seconds"][0]:
            return None
        means = {name: share(total, count) for name, (count, total) in self.grown.items()}
        rows = self.samples.predictions.rows
        seen_ms = 1000 * float((rows["latency_s"] - rows["lag_s"]).mean()) if len(rows) else math.nan
        request_ms, queue_ms, call_ms = (
            1000 * means[f"temper_{name}_seconds"] for name in ("request", "queue", "call")
        )
        return {
            "queue": queue_ms, "model": call_ms, "gateway": request_ms - queue_ms - call_ms,
            "network": seen_ms - request_ms, "batch_images": means["temper_batch_images"],
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """The summary for JSON; docs/load.md describes it."""
        samples, generator = self.samples, self.generator
        predictions = samples.predictions
        names = samples.text("name")
        found: dict[str, Any] = {
            "format": FORMAT, "scenario": self.scenario, "verdict": self.verdict,
            "generator_saturated": generator.is_saturated, "began_at": self.began_s,
            "duration_s": self.ended_s - self.began_s,
            "objectives": [one.record() for one in self.objectives],
            "predictions": _latencies(predictions) | {
                "per_s": share(int((~predictions.failed).sum()), self.ended_s - self.began_s),
                "dropped": generator.dropped,
            },
            "requests": {name: _latencies(samples.of(names == name)) for name in sorted(set(names))},
            "errors": samples.errors(),
            "accuracy": {
                kind: {"images": images, "right": right, "accuracy": reached}
                for kind, (images, right, reached) in accuracies(samples).items()
            },
            "versions": {model: {str(v): n for v, n in each.items()} for model, each in versions(samples).items()},
            "server_ms": self.server_ms(),
            "generator": {
                "processes": len(np.unique(samples.cpu[:, 0])), "lag_p99_ms": generator.lag_p99_ms,
                "cpu_share": generator.cpu_share, "due": generator.due, "dropped": generator.dropped,
            },
            "steps": [asdict(step) for step in self.steps], "figures": self.figures, "notes": self.notes,
            "settings": self.settings.model_dump(mode="json", exclude={"api_key", "prepared"}),
        }  # fmt: skip
        return {name: _without_nan(value) for name, value in found.items()}


def _latencies(samples: Samples) -> dict[str, Any]:
    latency_ms = 1000 * samples.rows["latency_s"]
    return {
        "count": len(latency_ms), "failed": int(samples.failed.sum()),
        "mean_ms": float(latency_ms.mean()) if len(latency_ms) else math.nan,
        **{f"p{100 * p:g}_ms".replace(".", "_"): percentile(latency_ms, p) for p in PERCENTILES},
        "max_ms": float(latency_ms.max()) if len(latency_ms) else math.nan,
    }  # fmt: skip


def _without_nan(value: Any) -> Any:
    """Replace what JSON cannot say by null."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def seconds(run: Run) -> list[dict[str, float]]:
    """One row a second of the run: predictions by the second in which they were due."""
    samples = run.samples.predictions
    second = np.floor(samples.rows["due_s"] - run.began_s).astype(int)
    dropped = np.floor(samples.dropped_s - run.began_s).astype(int)
    latency_ms, failed = 1000 * samples.rows["latency_s"], samples.failed
    found = []
    for number in range(max(1, math.ceil(run.ended_s - run.began_s))):
        here = second == number
        lost = int((dropped == number).sum())
        p50, p95, p99 = (percentile(latency_ms[here], share) for share in (0.5, 0.95, 0.99))
        found.append({
            "second": number, "due": int(here.sum()) + lost, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99,
            "errors": int(failed[here].sum()), "dropped": lost,
        })  # fmt: skip
    return found


def csv_text(run: Run) -> str:
    """The rows of `seconds`, with a header."""
    rows = seconds(run)
    written = io.StringIO()
    writer = csv.DictWriter(written, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: "" if math.isnan(value) else round(value, 3) for name, value in row.items()} for row in rows
    )
    return written.getvalue()


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first aligned to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    lines = []
    for first, *others in (headings, *rows):
        cells = [f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(["", f"{first:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def _number(value: float, unit: str = "") -> str:
    if not math.isfinite(value):
        return "not measured" if math.isnan(value) else "never"
    if unit == "share":
        return f"{value:.2%}"
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def _tables(run: Run) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """The tables of the report: a title, headings and rows."""
    samples = run.samples
    names = samples.text("name")
    rows = [
        [one.name, _number(one.value, one.unit), _number(one.limit, one.unit), "kept" if one.is_kept else "MISSED"]
        for one in run.objectives
    ]
    found: list[tuple[str, Sequence[str], list[list[str]]]] = [("Objectives", ("", "measured", "limit", ""), rows)]
    rows = []
    for name in sorted(set(names)):
        one = _latencies(samples.of(names == name))
        times = [_number(one[key]) for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        rows.append([name, f"{one['count']:,}", f"{one['failed']:,}", *times])
    found.append(("Requests, in ms since they were due", ("", "sent", "failed", "p50", "p95", "p99", "max"), rows))
    if server := run.server_ms():
        total = sum(server[name] for name in ("queue", "model", "gateway", "network"))
        rows = [
            [text, f"{server[name]:.2f}", f"{share(server[name], total):.0%}"]
            for name, text in (("queue", "queue"), ("model", "model server"), ("gateway", "rest of the gateway"),
                               ("network", "network and generator"))
        ]  # fmt: skip
        title = f"Where the mean time goes, in ms (a batch has {server['batch_images']:.2f} images)"
        found.append((title, ("", "ms", "share"), rows))
    if reached := accuracies(samples):
        rows = [[kind, f"{images:,}", f"{right:.2%}"] for kind, (images, _, right) in reached.items()]
        found.append(("Accuracy under load", ("", "images", "accuracy"), rows))
    if run.steps:
        rows = [
            [f"{one.rate:.4g}/s", f"{one.answered_per_s:.4g}/s", *map(_number, (one.p50_ms, one.p95_ms, one.p99_ms)),
             f"{one.failed}", f"{one.dropped}",
             "generator saturated" if one.is_saturated else "kept" if one.is_kept else "missed"]
            for one in run.steps
        ]  # fmt: skip
        found.append(("Rates", ("asked", "answered", "p50", "p95", "p99", "failed", "dropped", ""), rows))
    if run.figures:
        found.append(("Figures", ("", ""), [[name, _number(value)] for name, value in run.figures.items()]))
    return found


def _closing(run: Run) -> list[str]:
    """What the tables do not say, a line each."""
    generator = run.generator
    lag = "" if math.isnan(generator.lag_p99_ms) else f", started {generator.lag_p99_ms:.1f} ms late (p99)"
    lines = [f"generator: {generator.due:,} requests due, {generator.dropped:,} dropped{lag}, "
             f"{generator.cpu_share:.0%} of a core"]  # fmt: skip
    lines += [f"{count:,} x {text}" for text, count in list(run.samples.errors().items())[:5]]
    lines += run.notes
    if generator.is_saturated:
        lines.append("THE GENERATOR IS SATURATED: these figures are about it, not about the service. "
                     "Lower the rate, or add --workers or machines.")  # fmt: skip
    return lines


def text(run: Run) -> str:
    """The whole outcome for a terminal."""
    parts = [f"{title}\n{table(headings, rows)}" for title, headings, rows in _tables(run)]
    return "\n\n".join([*parts, "\n".join(_closing(run)), f"{run.scenario}: {run.verdict}"])


def present(run: Run) -> int:
    """Print the outcome, write the files, and return the exit code."""
    out = run.settings.out
    (out / "summary.json").write_text(json.dumps(run.record(), indent=2) + "\n", encoding="utf-8")
    (out / "seconds.csv").write_text(csv_text(run), encoding="utf-8")
    (out / "report.html").write_text(page(run), encoding="utf-8")
    click.echo(f"\n{text(run)} ({out}/summary.json, seconds.csv, report.html)")
    return run.exit_code


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 240, 64, 748, 12, 200  # of a chart and its axes
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --rule: #dfe3e8; --grey: #67707c;
  --a: #2563eb; --b: #b45309; --c: #b91c1c; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #14181f; --rule: #2d3440; --grey: #9aa4b2;
  --a: #7aa2ff; --b: #f0b35a; --c: #ff8a80; --good: #6fd08c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 800px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--rule); font-weight: 400; }
th { color: var(--grey); } th:first-child, td:first-child { text-align: left; }
.kept { color: var(--good); } .missed, .invalid { color: var(--c); font-weight: 600; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--grey); }
.rule { stroke: var(--rule); } .line { fill: none; stroke-width: 1.8; }
.a { stroke: var(--a); } .b { stroke: var(--b); stroke-dasharray: 6 3; } .c { stroke: var(--c); stroke-dasharray: 2 3; }
.limit { stroke: var(--grey); stroke-dasharray: 8 4; } .note { color: var(--grey); }
"""


def page(run: Run) -> str:
    """A page that needs nothing else: verdict, charts and tables."""
    rows = seconds(run)
    parts = [f'<h1>Load test: {escape(run.scenario)}, <span class="{run.verdict}">{run.verdict}</span></h1>']
    parts += [f'<p class="note">{escape(line)}</p>' for line in _closing(run)]
    lines = {"p50": ("a", "p50_ms"), "p95": ("b", "p95_ms"), "p99": ("c", "p99_ms")}
    parts.append("<h2>Latency in ms, by the second in which a request was due</h2>")
    parts.append(chart(rows, lines, is_log=True, limit=run.settings.p99_ms, limit_name="limit of p99"))
    parts.append("<h2>Requests due in each second, with those that failed or were dropped</h2>")
    parts.append(chart(rows, {"due": ("a", "due"), "failed": ("c", "errors"), "dropped": ("b", "dropped")}))
    for title, headings, body in _tables(run):
        cells = "".join(f"<tr>{''.join(f'<td{_look(cell)}>{escape(cell)}</td>' for cell in row)}</tr>" for row in body)
        head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
        parts.append(f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{cells}</table>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Load test: {escape(run.scenario)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _look(cell: str) -> str:
    return f' class="{cell.lower()}"' if cell.lower() in ("kept", "missed") else ""


def chart(
    rows: Sequence[dict[str, float]], lines: dict[str, tuple[str, str]], is_log: bool = False, limit: float = math.nan,
    limit_name: str = "",
) -> str:  # fmt: skip
    """Lines over the seconds of a run, as SVG; a gap where nothing was measured.

    Args:
        lines: by the name in the legend, the style and the column of `rows`.
        limit: a level to mark; nan for none.
    """
    values = [row[column] for row in rows for _, column in lines.values() if not math.isnan(row[column])]
    values += [] if math.isnan(limit) else [limit]
    top = max(values, default=1.0) or 1.0
    if is_log:
        low = 10.0 ** math.floor(math.log10(max(1e-3, min([value for value in values if value > 0], default=1.0))))
        high = 10.0 ** math.ceil(math.log10(max(top, 10 * low)))
        ticks = [float(f"1e{power}") for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    else:
        step = next(d for p in range(-3, 9) for d in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if d * 5 >= top)
        low, high = 0.0, step * math.ceil(top / step)
        ticks = [step * number for number in range(round(high / step) + 1)]

    def up(value: float) -> float:
        share = math.log10(max(value, low) / low) / math.log10(high / low) if is_log else value / high
        return BOTTOM + (TOP - BOTTOM) * share

    def across(second: float) -> float:
        return LEFT + (RIGHT - LEFT) * second / max(1, len(rows) - 1)

    parts = []
    for tick in ticks:
        parts.append(f'<path class="rule" d="M{LEFT} {up(tick):.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    every = max(1, math.ceil(len(rows) / 10))
    for second in range(0, len(rows), every):
        parts.append(f'<text x="{across(second):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{second} s</text>')
    if not math.isnan(limit):
        parts.append(f'<path class="line limit" d="M{LEFT} {up(limit):.1f}H{RIGHT}"/>')
    for style, column in lines.values():
        path, pen = "", "M"
        for row in rows:
            if math.isnan(row[column]):
                pen = "M"
                continue
            path += f"{pen}{across(row['second']):.1f} {up(row[column]):.1f}"
            pen = "L"
        parts.append(f'<path class="line {style}" d="{path}"/>')
    legend = [(style, name) for name, (style, _) in lines.items()]
    legend += [] if math.isnan(limit) else [("limit", limit_name)]
    at = float(LEFT)
    for style, name in legend:
        parts.append(f'<path class="line {style}" d="M{at:.0f} {HEIGHT - 8}h24"/>')
        parts.append(f'<text x="{at + 30:.0f}" y="{HEIGHT - 4}">{escape(name)}</text>')
        at += 46 + 8 * len(name)
    label = escape(", ".join(f"{name} up to {_top(rows, column)}" for name, (_, column) in lines.items()))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _top(rows: Sequence[dict[str, float]], column: str) -> str:
    return f"{max((row[column] for row in rows if not math.isnan(row[column])), default=0.0):.4g}"
