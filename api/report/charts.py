"""The plots of a report page, as SVG. Helpers take plain text, which they escape, and return markup."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from markupsafe import Markup

Json = Mapping[str, Any]
Points = list[tuple[float, float]]

WIDTH, HEIGHT = 480, 290  # of a plot, in units of about a pixel
LEFT, RIGHT, TOP, BOTTOM = 60, 470, 26, 246  # where its axes lie
MANY = 30  # most classes that have numbers in the matrix and a table that is not folded
LOOKS = {  # name in the report -> name on the page, colour (a class of report.css), dashes
    "data_loss": ("data loss", "blue", "none"),
    "adversarial_loss": ("adversarial loss", "red", "8 3"),
    "l1": ("L1", "green", "2 3"),
    "l2": ("L2", "purple", "9 3 2 3"),
    "l2_sp": ("L2-SP", "ochre", "5 3"),
    "validation_cross_entropy": ("validation cross-entropy", "ink", "none"),
    "validation_accuracy": ("validation", "ink", "none"),
    "validation_accuracy_under_fgsm": ("under FGSM", "ochre", "8 3"),
    "validation_accuracy_under_pgd": ("under PGD", "red", "2 3"),
    "worst": ("worst of the three", "halo", "none"),
    "fgsm": ("FGSM", "ochre", "8 3"),
    "pgd": ("PGD", "red", "2 3"),
    "square": ("Square", "blue", "9 3 2 3"),
    "kept": ("epoch kept", "grey", "4 4"),
    "overfitted": ("attack overfitted in epoch", "red", "1 3"),
    "epsilon": ("ε of the report", "grey", "4 4"),
    "right": ("correct", "right", "none"),
    "wrong": ("wrong; darker for a larger share of the true class", "wrong", "none"),
    "accuracy": ("accuracy of the images in a range", "right", "none"),
    "calibrated": ("perfect calibration", "grey", "4 4"),
    "dropped": ("trial that was dropped", "grey", "none"),
    "chosen": ("trial that was chosen", "blue", "none"),
    "best": ("best so far in the round", "ink", "4 2"),
    "front": ("Pareto front", "ink", "4 2"),
}


@dataclass(frozen=True)
class Figure:
    """A drawing with its legend: pairs of a shape in 24 x 12 and a text. Shapes and drawing are SVG."""

    title: str
    drawing: Markup
    legend: Sequence[tuple[Markup, str]]
    note: str = ""
    wide: bool = False


def percent(share: float) -> str:
    """A percentage that is only 100% if everything is."""
    return f"{share:.2%}" if 0.995 <= share < 1 else f"{share:.1%}"


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`; equal distances on it are equal differences of `scale`."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str] = "{:g}".format
    scale: Callable[[float], float] = float

    def across(self, value: float) -> float:
        """Position of a value if this is the x axis of a plot."""
        return LEFT + (RIGHT - LEFT) * self._share(value)

    def up(self, value: float) -> float:
        """Position of a value if this is the y axis of a plot."""
        return BOTTOM + (TOP - BOTTOM) * self._share(value)

    def _share(self, value: float) -> float:
        low, at, high = (self.scale(one) for one in (self.low, min(max(value, self.low), self.high), self.high))
        return (at - low) / (high - low)


def linear(label: str, low: float, high: float, *, least: float = 0.0, percent: bool = False) -> Axis:
    """About six ticks, which are multiples of 1, 2 or 5 times a power of ten, `least` or more apart."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    wanted = max((high - low) / 6, least) * (1 - 1e-9)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= wanted)
    ticks = [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, ticks, "{:.0%}".format if percent else "{:g}".format)


def logarithmic(label: str, values: Sequence[float]) -> Axis:
    """At most six decades; smaller values, such as zero, are drawn on the lower edge."""
    positive = [value for value in values if value > 0] or [1.0]
    top = math.ceil(math.log10(max(positive)))
    bottom = min(max(math.floor(math.log10(min(positive))), top - 6), top - 1)
    ticks = [float(f"{digit}e{power}") for power in range(bottom, top) for digit in (1, 2, 5)] + [10.0**top]
    return Axis(label, 10.0**bottom, 10.0**top, ticks if top - bottom < 3 else ticks[::3], scale=math.log10)


def series(records: Sequence[Json], x: str, names: Iterable[str]) -> dict[str, Points]:
    """The points of each name that the records have."""
    found = {name: [(record[x], record[name]) for record in records if name in record] for name in names}
    return {name: points for name, points in found.items() if points}


def line_plot(
    title: str, x: Axis, y: Axis, series: Mapping[str, Points], marks: Mapping[str, float | None], note: str
) -> Figure:
    """A line with dots for each series, and vertical lines at the marks."""
    upright = {name: value for name, value in marks.items() if value is not None}
    drawing: list[str] = [_path(f"M{x.across(value):.1f} {TOP}V{BOTTOM}", name) for name, value in upright.items()]
    for name, points in series.items():
        places = [(x.across(at), y.up(value)) for at, value in points]
        drawing.append(_path("M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places), name))
        if len(points) <= 60:  # more would hide the line
            drawing += [
                _dot(px, py, name, f"{LOOKS[name][0]} {value:.4g} at {at:g}")
                for (px, py), (at, value) in zip(places, points, strict=True)
            ]
    legend = [(_path("M0 6H24", name), LOOKS[name][0]) for name in series]
    legend += [(_path("M12 0V12", name), f"{LOOKS[name][0]}: {value:g}") for name, value in upright.items()]
    told = (f"{LOOKS[name][0]} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in series.items())
    return Figure(title, _plot(title, told, x, y, "".join(drawing)), legend, note)


def gradient_share_plot(gradient_shares: Sequence[Json]) -> Figure:
    """The share of each term in the update: a stacked bar per epoch."""
    step = gradient_shares[0]["epoch"]  # long runs measure it every few epochs
    x = linear("epoch", 0.5, gradient_shares[-1]["epoch"] + 0.5, least=1)
    y = linear("share of the update", 0, 1, percent=True)
    bars = {name: "" for name in LOOKS if name in gradient_shares[0]}
    wide = (0.84 if len(gradient_shares) <= 60 else 1.0) * step
    for record in gradient_shares:
        middle = record["epoch"] - (step - 1) / 2  # of the epochs since the last
        left, right = (x.across(middle + side) for side in (-wide / 2, wide / 2))
        top = 0.0
        for name in bars:
            foot, top = top, top + record[name]["share"]
            bars[name] += _box(left, y.up(foot), right, y.up(top))
    texts = [f"{LOOKS[name][0]}, median {median(one[name]['share'] for one in gradient_shares):.2%}" for name in bars]
    svg = _plot("Share of each term in the update", texts, x, y, "".join(map(_area, bars.values(), bars, texts)))
    legend = [(_area(SWATCH, name), text) for name, text in zip(bars, texts, strict=True)]
    return Figure(
        "Share of each term in the update", svg, legend, "The norm of each term's gradient over the sum of all."
    )


def search_plot(trials: Sequence[Json], chosen: int | None) -> Figure:
    """Cross-entropy of every trial in every round against time, with its standard error."""
    rounds = max(len(trial["scores"]) for trial in trials)  # after which variants of the choice are tried
    scores = [
        (trial, number, score) for trial in trials
        for number, score in enumerate(trial["scores"], start=rounds if trial["origin"] == "variant" else 0)
    ]  # fmt: skip
    bounds = [
        bound for _, _, score in scores
        for bound in (score["cross_entropy"], max(score["cross_entropy"] - score["standard_error"], 1e-3))
    ]  # fmt: skip
    x = linear("seconds since the search began", 0, max(score["ended_s"] for _, _, score in scores))
    y = logarithmic("held-out loss in nats, log scale", bounds)
    drawing: list[str] = []
    told = []
    for number in sorted({number for _, number, _ in scores}):
        best: float | None = None
        path = ""
        for trial, _, score in sorted((one for one in scores if one[1] == number), key=lambda one: one[2]["ended_s"]):
            at, loss, error = x.across(score["ended_s"]), score["cross_entropy"], score["standard_error"]
            name = "chosen" if trial["trial"] == chosen else "dropped"
            drawing.append(_path(f"M{at:.1f} {y.up(loss - error):.1f}V{y.up(loss + error):.1f}", name))
            text = f"{trial['recipe']}: {loss:.3f} ± {error:.3f}, {percent(score['accuracy'])}"
            drawing.append(_dot(at, y.up(loss), name, text, 5 if name == "chosen" else 3.4))
            told.append(f"round {number + 1}, {text}")
            lower = loss if best is None else min(best, loss)
            path += f"M{at:.1f} {y.up(lower):.1f}" if best is None else f"H{at:.1f}V{y.up(lower):.1f}"
            best = lower
        drawing.append(_path(path, "best"))
    legend = [(_path("M0 6H24", name), LOOKS[name][0]) for name in ("dropped", "chosen", "best")]
    note = f"{len(trials)} recipes; bars are one standard error. Later rounds train longer, on all folds."
    return Figure("Search", _plot("Search", told, x, y, "".join(drawing)), legend, note)


def front_plot(trials: Sequence[Json], objective: str, chosen: int | None, front: Sequence[int]) -> Figure:
    """Accuracy and another objective of every trial of the last round, with those that no other beats connected."""
    points = [(one, one["scores"][-1]["objectives"]) for one in trials]
    words = objective.replace("_", " ")
    x, y = (
        linear(label, math.floor(10 * min(0.9, *(reached[name] for _, reached in points))) / 10, 1, percent=True)
        for label, name in (("accuracy", "accuracy"), (words, objective))
    )
    drawing: list[str] = []
    told = []
    places = sorted((-reached["accuracy"], reached[objective]) for one, reached in points if one["trial"] in front)
    path, highest = "", -1.0  # from the most accurate trial on, as far as the other objective grows
    for accuracy, other in places:
        if other > highest:
            highest = other
            path += f"{'L' if path else 'M'}{x.across(-accuracy):.1f} {y.up(other):.1f}"
    drawing.append(_path(path, "front"))
    for one, reached in points:
        name = "chosen" if one["trial"] == chosen else "dropped"
        text = f"{one['recipe']}: accuracy {percent(reached['accuracy'])}, {words} {percent(reached[objective])}"
        size = 5 if name == "chosen" else 3.4
        drawing.append(_dot(x.across(reached["accuracy"]), y.up(reached[objective]), name, text, size))
        told.append(text)
    legend = [(_path("M0 6H24", name), LOOKS[name][0]) for name in ("dropped", "chosen", "front")]
    title = f"Accuracy and {words}"
    note = "Trials of the last round, on held-out images. More is better in both."
    return Figure(title, _plot(title, told, x, y, "".join(drawing)), legend, note)


def reliability_plot(bins: Sequence[Json]) -> Figure:
    """Accuracy by confidence (Guo et al. 2017), with the number of images above each bin."""
    x, y = linear("confidence", 0, 1, percent=True), linear("accuracy", 0, 1, percent=True)
    drawing, told = [_text(LEFT - 8, TOP - 13, "images", "end")], []
    for one in bins:
        left, right = x.across(one["lower"]), x.across(one["upper"])
        drawing.append(_text((left + right) / 2, TOP - 13, f"{one['images']:,}", "middle"))
        if one["images"]:
            told.append(f"{one['images']:,} images at {one['confidence']:.1%}, {one['accuracy']:.1%} right")
            drawing.append(_area(_box(left + 1, BOTTOM, right - 1, y.up(one["accuracy"])), "accuracy", told[-1]))
    drawing.append(_path(f"M{LEFT} {BOTTOM}L{RIGHT} {TOP}", "calibrated"))
    legend = [(_area(SWATCH, "accuracy"), LOOKS["accuracy"][0])]
    legend.append((_path("M0 12L24 0", "calibrated"), LOOKS["calibrated"][0]))
    return Figure("Reliability", _plot("Reliability", told, x, y, "".join(drawing)), legend)


def confusion_plot(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Images by true and predicted class. Empty cells are not drawn: a thousand classes have a million cells."""
    names = [name if len(name) <= 24 else f"{name[:14]}…{name[-9:]}" for name in classes]
    count, wide = len(names), len(names) > 12
    font = 12 if count <= MANY else 10
    longest = 0.62 * font * max(map(len, names))
    left = 36 + longest
    cell = min(72.0, (min(640, 1000 - left) if wide else min(380, WIDTH - left)) / count)
    side, turn = cell * count, 0 if longest < cell else -45 if cell > 18 else -90
    below = side + 16 + longest * math.sin(math.radians(-turn))
    size = min(13.0, 1.5 * cell / max(len(str(images)) for row in matrix for images in row))
    lines = range(count + 1) if count <= MANY else (0, count)
    ruled = "".join(f"M{left} {k * cell:.1f}h{side:.1f}M{left + k * cell:.1f} 0v{side:.1f}" for k in lines)
    drawing = [f'<path class="rule" d="{ruled}"/>']
    for row, images in enumerate(matrix):
        for column, number in ((column, number) for column, number in enumerate(images) if number):
            share, px, py = number / sum(images), left + column * cell, row * cell
            strength = 0.12 + 0.6 * share if share <= 0.5 else 0.5 + 0.5 * share  # the digits stay legible
            told = f"{number} of {sum(images)} images of {classes[row]}: {classes[column]}"
            kind = "right" if row == column else "wrong"
            drawing.append(_area(_box(px, py, px + cell, py + cell), kind, told, strength))
            if count <= MANY:
                look = f"middle {'strong' if share > 0.5 else 'number'}"
                drawing.append(_text(px + cell / 2, py + cell / 2 + size / 3, str(number), look, size=size))
    for k in range(0, count, math.ceil(font / cell)):
        at, look = (k + 0.5) * cell, "end" if turn else "middle"
        drawing.append(_text(left - 8, at + font / 3, names[k], "end", size=font))
        drawing.append(_text(left + at + (font / 3 if turn else 0), side + 15, names[k], look, turn, font))
    drawing.append(_text(left + side / 2, below + 16, "predicted class", "middle"))
    drawing.append(_text(12, side / 2, "true class", "middle", -90))
    told = f"{sum(row[k] for k, row in enumerate(matrix))} of {sum(map(sum, matrix))} images correct"
    svg = _svg("Confusion matrix", told, left + side + 2, below + 22, "".join(drawing))
    legend = [(_area(SWATCH, name), LOOKS[name][0]) for name in ("right", "wrong")]
    return Figure("Confusion matrix", svg, legend, wide=wide)


def _plot(title: str, told: Iterable[str], x: Axis, y: Axis, drawing: str) -> Markup:
    """A drawing between its axes; `told` describes it to screen readers."""
    parts = []
    for tick in y.ticks:
        at = y.up(tick)
        parts += [f'<path class="rule" d="M{LEFT} {at:.1f}H{RIGHT}"/>', _text(LEFT - 8, at + 4, y.text(tick), "end")]
    for tick in x.ticks:
        at = x.across(tick)
        parts.append(f'<path class="axis" d="M{at:.1f} {BOTTOM}v5"/>')
        parts.append(_text(at, BOTTOM + 19, x.text(tick), "middle"))
    parts += [drawing, f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>']
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 6, x.label, "middle"))
    parts.append(_text(12, (TOP + BOTTOM) / 2, y.label, "middle", -90))
    return _svg(title, "; ".join(told), WIDTH, HEIGHT, "".join(parts))


def _svg(title: str, told: str, width: float, height: float, drawing: str) -> Markup:
    label = escape(f"{title}: {told}")
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return Markup(f'<svg class="plot" {size} role="img" aria-label="{label}">{drawing}</svg>')  # noqa: S704 (escaped) # nosec B704


def _text(x: float, y: float, text: str, look: str, turn: int = 0, size: float = 12) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}"{turned}>{escape(text)}</text>'


def _path(d: str, name: str) -> Markup:
    _, colour, dashes = LOOKS[name]
    return Markup(f'<path class="line {colour}" stroke-dasharray="{dashes}" d="{d}"/>')  # noqa: S704 # nosec B704


def _dot(x: float, y: float, name: str, told: str, r: float = 2.4) -> str:
    at = f'cx="{x:.1f}" cy="{y:.1f}" r="{r}"'
    return f'<circle class="area {LOOKS[name][1]}" {at}><title>{escape(told)}</title></circle>'


def _area(d: str, name: str, told: str = "", strength: float = 1.0) -> Markup:
    title = f"<title>{escape(told)}</title>" if told else ""
    return Markup(f'<path class="area {LOOKS[name][1]}" opacity="{strength:.2f}" d="{d}">{title}</path>')  # noqa: S704 (escaped) # nosec B704


def _box(left: float, bottom: float, right: float, top: float) -> str:
    return f"M{left:.1f} {bottom:.1f}H{right:.1f}V{top:.1f}H{left:.1f}z"


SWATCH = _box(5, 12, 19, 0)
