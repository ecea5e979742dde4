"""A version's report card as an HTML page that needs nothing else: no script, no font, no other host.

Only the standard library, for the gateway's memory is small. Helpers take plain text, which they escape, and return
markup; markup that they take is called `drawing`, `markup` or `legend`.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

Json = Mapping[str, Any]
Points = list[tuple[float, float]]

WIDTH, HEIGHT = 480, 290  # of a plot, in units of about a pixel
LEFT, RIGHT, TOP, BOTTOM = 60, 470, 26, 246  # where its axes lie
MANY = 30  # most classes that have numbers in the matrix and a table that is not folded
LOOKS = {  # of what is drawn: its name in the report -> what the page calls it, its colour, its dashes
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
    "right": ("right", "right", "none"),
    "wrong": ("wrong; the stronger, the larger the share of the true class", "wrong", "none"),
    "accuracy": ("share right of the images in a range", "right", "none"),
    "calibrated": ("perfect calibration", "grey", "4 4"),
}
NO_ZEROS = (
    "L1 promised no exact zeros in {}: the method reaches these kernels only through other parameters, so L1 is a "
    "subgradient on the effective kernel there, which makes weights smaller but does not stop them at zero."
)


def report_page(name: str, version: int, report: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The page.

    Args:
        report: as `trainer.report` makes it, complete or not yet; of a version without a base, its card.
        manifest: what the version is, as it was published.
    """
    title = escape(f"{name}:{version}")
    if manifest.get("base") is None:
        parts = [_table("Card", ("", ""), _flat(report))]
    else:
        spec = escape(json.dumps(manifest.get("spec"), indent=2, ensure_ascii=False))
        parts = [_subtitle(manifest), _headline(report), *_notices(report)]
        parts += ['<div class="plots">', *_plots(report, manifest), "</div>"]
        parts += ['<div class="tables">', *_tables(report, manifest), "</div>"]
        parts.append(f"<details><summary>Spec</summary><pre>{spec}</pre></details>")
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title} · report card</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>{STYLE}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def _subtitle(manifest: Json) -> str:
    spec, dataset = manifest.get("spec") or {}, manifest.get("dataset") or {}
    method = spec.get("method", "fine-tuned")
    options = ", ".join(f"{key} {value}" for key, value in _flat(spec.get(method) or {}))
    parts = [f"from {manifest['base']} by {method}" + (f" ({options})" if options else "")]
    if dataset:
        images = f"{dataset['images']:,} images of {len(manifest['classes'])} classes"
        parts.append(f"{images} in {dataset.get('filename') or 'an upload'}")
    parts.append(str(manifest.get("polarity", "")).replace("_", " "))
    return f'<p class="quiet">{escape(" · ".join(filter(None, parts)))}</p>'


def _headline(report: Json) -> str:
    """The figures that matter most."""
    tiles = []
    if found := report.get("validation"):
        note = f"95% interval {_interval(found)}, {found['images']:,} images"
        tiles.append(("Validation accuracy", _percent(found["accuracy"]), note))
    if found := report.get("generalization_gap"):
        note = f"percentage points; in cross-entropy {found['cross_entropy']:+z.2g} nats"
        tiles.append(("Generalization gap", f"{100 * found['accuracy']:+z.1f} pp", note))
    if found := report.get("calibration"):
        note = "ECE: mean distance of confidence and accuracy"
        tiles.append(("Calibration error", f"{found['expected_calibration_error']:.1%}", note))
    if found := report.get("robustness"):
        size, doubt = found["epsilon"], "not to be trusted: " if found.get("gradient_masking") else ""
        title = f"{found['attack'].upper()}, ε = {size:g}"
        tiles.append((title, _percent(found["accuracy"]), f"{doubt}accuracy under attack"))
        worst = next((_percent(point["worst"]) for point in found.get("curve", ()) if point["epsilon"] == size), "…")
        note = "still being worked out" if worst == "…" else f"{doubt}accuracy under FGSM, PGD and Square"
        tiles.append((f"Worst case, ε = {size:g}", worst, note))
    if found := report.get("parameters"):
        note = f"of {found['total']:,} ({found['trained'] / found['total']:.1%})"
        tiles.append(("Trained parameters", f"{found['trained']:,}", note))
    cells = (f"<div><dt>{escape(a)}</dt><dd><b>{escape(b)}</b> {escape(c)}</dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _notices(report: Json) -> Iterator[str]:
    """What to know before believing the rest."""
    training, robustness = report.get("training") or {}, report.get("robustness") or {}
    ended, kept = training.get("ended_by"), f"the weights of epoch {training.get('kept_epoch')} are kept"
    if reasons := robustness.get("gradient_masking"):
        yield _notice("bad", "The robustness figures are not to be trusted: gradients are masked", *reasons)
    if ended == "catastrophic_overfitting":
        text = "attacks of one step were withstood, but no longer those of several"
        text = f"Training ended in epoch {training.get('overfitted_attack_in_epoch')}: {text}; {kept}."
        yield _notice("bad", "Catastrophic overfitting of the attack", text)
    if warnings := (report.get("regularization") or {}).get("warnings"):
        yield _notice("poor", "Regularization", *(warning["message"] for warning in warnings))
    if ended == "early_stopping":
        yield _notice("note", "Early stopping", f"Training ended after epoch {training['epochs']}; {kept}.")
    if "curve" not in robustness:
        text = "Accuracy under PGD and Square, signs of gradient masking, what was forgotten of the base's task."
        yield _notice("note", "Still being worked out", text)


def _notice(kind: str, title: str, *texts: str) -> str:
    listed = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<aside class="{kind}"><b>{escape(title)}</b><ul>{listed}</ul></aside>'


def _plots(report: Json, manifest: Json) -> Iterator[str]:
    training, robustness = report.get("training") or {}, report.get("robustness") or {}
    if history := report.get("history"):
        epochs = _linear("epoch", 1, len(history), least=1)
        marks = {"kept": training.get("kept_epoch"), "overfitted": training.get("overfitted_attack_in_epoch")}
        losses = _series(history, "epoch", [name for name in LOOKS if "accuracy" not in name])
        loss = _logarithmic("loss in nats, log scale", [y for points in losses.values() for _, y in points])
        yield _line_plot("Loss by epoch", epochs, loss, losses, marks, "Training terms are means over the epoch.")
        shares = _series(history, "epoch", [name for name in LOOKS if name.startswith("validation_accuracy")])
        least = min([0.9, *(y for points in shares.values() for _, y in points)])
        right = _linear("validation images right", math.floor(10 * least) / 10, 1, percent=True)
        note = "The attacks of every epoch are quick, and on some of the images." if len(shares) > 1 else ""
        yield _line_plot("Accuracy by epoch", epochs, right, shares, marks, note)
    if receipt := (report.get("regularization") or {}).get("epochs"):
        yield _receipt(receipt)
    if curve := robustness.get("curve"):
        sizes = _linear("ε, the largest change of a pixel (0 to 1)", 0, max(point["epsilon"] for point in curve))
        right = _linear("validation images right", 0, 1, percent=True)
        attacks = _series(curve, "epsilon", ("worst", "fgsm", "pgd", "square"))
        settings = ", ".join(f"{name} {value}" for name, value in _flat(robustness.get("settings") or {}))
        note = f"On {robustness['images']:,} validation images; {settings}."
        note = f"Not to be trusted: gradients are masked. {note}" if robustness.get("gradient_masking") else note
        yield _line_plot("Robustness", sizes, right, attacks, {"epsilon": robustness["epsilon"]}, note)
    if bins := (report.get("calibration") or {}).get("bins"):
        yield _reliability(bins)
    if matrix := (report.get("validation") or {}).get("confusion_matrix"):
        yield _confusion(matrix, manifest["classes"])


def _tables(report: Json, manifest: Json) -> Iterator[str]:
    if found := (report.get("validation") or {}).get("classification_report"):
        every = [*found["classes"].items(), ("mean", found["macro avg"]), ("mean by support", found["weighted avg"])]
        rows = [
            (name, *(f"{one[score]:.3f}" for score in ("precision", "recall", "f1-score")), f"{one['support']:.0f}")
            for name, one in every
        ]
        table = _table("Classes", ("", "precision", "recall", "F1", "support"), rows)
        folded = f"<details><summary>Classes, one by one</summary>{table}</details>"
        yield folded if len(found["classes"]) > MANY else table
    if across := report.get("cross_validation"):
        rows = [(f"fold {number}", _percent(share)) for number, share in enumerate(across["folds"], start=1)]
        rows.append(("all images", f"{_percent(across['accuracy'])} ({_interval(across)})"))
        note = f"Each of {across['images']:,} images was held out once; the interval is of 95%."
        yield _table("Cross-validation", ("", "accuracy"), rows, note)
    if bins := (report.get("calibration") or {}).get("bins"):
        rows = [
            (f"{one['lower']:.0%} to {one['upper']:.0%}", f"{one['images']:,}")
            + tuple(f"{one[key]:.1%}" for key in ("confidence", "accuracy"))
            for one in bins if one["images"]
        ]  # fmt: skip
        note = "By the highest probability; ranges without images are left out."
        yield _table("Calibration", ("confidence", "images", "mean confidence", "accuracy"), rows, note)
    if found := report.get("sparsity"):
        exact, shrunk = found.get("exact_zeros_in", ()), found.get("shrunk_without_zeros", ())
        promises = dict.fromkeys(exact, "exact zeros") | dict.fromkeys(shrunk, "no exact zeros")
        shares = {**found["by_layer"], "all": found["zeros"]}
        columns = 3 if promises else 2  # L1 may be off
        rows = [(layer, f"{share:.2%}", promises.get(layer, ""))[:columns] for layer, share in shares.items()]
        head = ("kernel", "exact zeros", "promised by L1")[:columns]
        yield _table("Sparsity", head, rows, NO_ZEROS.format(", ".join(shrunk)) if shrunk else "")
    if found := report.get("forgetting"):
        rows = [(manifest["base"], _percent(found["base"])), ("this version", _percent(found["accuracy"]))]
        rows.append(("lost", f"{100 * found['lost']:.1f} points"))
        note = f"On {found['images']:,} images of the base's own task: {found['sample']}."
        yield _table("Forgetting", ("", "accuracy"), rows, note)
    else:
        gone = "forgetting" in report and "curve" in (report.get("robustness") or {})
        text = "Nothing is there any more to measure it on." if gone else "Still being worked out."
        yield _section("Forgetting", "", text)
    if found := report.get("cost"):
        rows = [(stage, f"{seconds:,g} s") for stage, seconds in found["seconds"].items()]
        sizes = {key: found[key] for key in found if key.endswith("_bytes")}
        rows += [(key.removesuffix("_bytes").replace("_", " "), f"{size / 1e6:,.0f} MB") for key, size in sizes.items()]
        rows.append(("training images a second", f"{found['images_per_second']:,}"))
        yield _table("Cost", ("", ""), rows, f"On {report.get('device', 'an unknown device')}.")


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> str:
    """The first column names the rows."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{escape(str(first))}</th>{"".join(f"<td>{escape(str(cell))}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    ]
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return _section(title, f"<table>{header}<tbody>{''.join(lines)}</tbody></table>", note)


def _figure(title: str, drawing: str, legend: Iterable[tuple[str, str]], note: str = "", *, wide: bool = False) -> str:
    """A drawing with its legend, which is pairs of a shape in 24 x 12 and a text."""
    shapes = "".join(
        f'<li><svg width="24" height="12" aria-hidden="true">{shape}</svg>{escape(text)}</li>' for shape, text in legend
    )
    return _section(title, f'{drawing}<ul class="legend">{shapes}</ul>', note, "wide" if wide else "")


def _section(title: str, markup: str, note: str = "", kind: str = "") -> str:
    below = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{markup}{below}</section>'


def _percent(share: float) -> str:
    """Never 100% of what is less."""
    return f"{share:.2%}" if 0.995 <= share < 1 else f"{share:.1%}"


def _interval(score: Json) -> str:
    low, high = score["accuracy_interval"]
    return f"{low:.1%} to {high:.1%}"


def _flat(record: Json) -> Iterator[tuple[str, str]]:
    """Names and values; what is inside another value is named after both."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{key}: {name}", inner) for name, inner in _flat(value))
        else:
            yield key.replace("_", " "), " ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; `scale` is what makes it even."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str] = "{:g}".format
    scale: Callable[[float], float] = float

    def across(self, value: float) -> float:
        """Where a value lies when this is the x axis of a plot."""
        return LEFT + (RIGHT - LEFT) * self._share(value)

    def up(self, value: float) -> float:
        """Where a value lies when this is the y axis of a plot."""
        return BOTTOM + (TOP - BOTTOM) * self._share(value)

    def _share(self, value: float) -> float:
        low, at, high = (self.scale(one) for one in (self.low, min(max(value, self.low), self.high), self.high))
        return (at - low) / (high - low)


def _linear(label: str, low: float, high: float, *, least: float = 0.0, percent: bool = False) -> Axis:
    """About six ticks, which are multiples of 1, 2 or 5 times a power of ten, `least` or more apart."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    wanted = max((high - low) / 6, least) * (1 - 1e-9)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= wanted)
    ticks = [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, ticks, "{:.0%}".format if percent else "{:g}".format)


def _logarithmic(label: str, values: Sequence[float]) -> Axis:
    """At most six decades; what lies below, as zero does, is drawn on the lower edge."""
    positive = [value for value in values if value > 0] or [1.0]
    top = math.ceil(math.log10(max(positive)))
    bottom = min(max(math.floor(math.log10(min(positive))), top - 6), top - 1)
    ticks = [float(f"{digit}e{power}") for power in range(bottom, top) for digit in (1, 2, 5)] + [10.0**top]
    return Axis(label, 10.0**bottom, 10.0**top, ticks if top - bottom < 3 else ticks[::3], scale=math.log10)


def _series(records: Sequence[Json], x: str, names: Iterable[str]) -> dict[str, Points]:
    """The points of each name that the records have."""
    found = {name: [(record[x], record[name]) for record in records if name in record] for name in names}
    return {name: points for name, points in found.items() if points}


def _line_plot(
    title: str, x: Axis, y: Axis, series: Mapping[str, Points], marks: Mapping[str, float | None], note: str
) -> str:
    """A line with dots for each of the series, and upright lines at the marks."""
    upright = {name: value for name, value in marks.items() if value is not None}
    drawing = [_path(f"M{x.across(value):.1f} {TOP}V{BOTTOM}", name) for name, value in upright.items()]
    for name, points in series.items():
        places = [(x.across(at), y.up(value)) for at, value in points]
        drawing.append(_path("M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places), name))
        if len(points) <= 60:  # more would hide the line
            drawing += [
                f'<circle class="area {LOOKS[name][1]}" cx="{px:.1f}" cy="{py:.1f}" r="2.4">'
                f"<title>{LOOKS[name][0]} {value:.4g} at {at:g}</title></circle>"
                for (px, py), (at, value) in zip(places, points, strict=True)
            ]
    legend = [(_path("M0 6H24", name), LOOKS[name][0]) for name in series]
    legend += [(_path("M12 0V12", name), f"{LOOKS[name][0]}: {value:g}") for name, value in upright.items()]
    told = (f"{LOOKS[name][0]} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in series.items())
    return _figure(title, _plot(title, told, x, y, "".join(drawing)), legend, note)


def _receipt(receipt: Sequence[Json]) -> str:
    """What the update is made of: a stacked bar an epoch."""
    x = _linear("epoch", 0.5, len(receipt) + 0.5, least=1)
    y = _linear("share of the update", 0, 1, percent=True)
    bars = {name: "" for name in LOOKS if name in receipt[0]}
    half = 0.42 if len(receipt) <= 60 else 0.5
    for record in receipt:
        left, right = (x.across(record["epoch"] + side) for side in (-half, half))
        top = 0.0
        for name in bars:
            foot, top = top, top + record[name]["share"]
            bars[name] += _box(left, y.up(foot), right, y.up(top))
    texts = [f"{LOOKS[name][0]}, median {median(one[name]['share'] for one in receipt):.2%}" for name in bars]
    svg = _plot("What the update is made of", texts, x, y, "".join(map(_area, bars.values(), bars, texts)))
    legend = [(_area(SWATCH, name), text) for name, text in zip(bars, texts, strict=True)]
    return _figure("What the update is made of", svg, legend, "The norm of each term's gradient over the sum of all.")


def _reliability(bins: Sequence[Json]) -> str:
    """Accuracy by confidence (Guo et al. 2017), with the number of images above each bin."""
    x, y = _linear("confidence", 0, 1, percent=True), _linear("images right", 0, 1, percent=True)
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
    return _figure("Reliability", _plot("Reliability", told, x, y, "".join(drawing)), legend)


def _confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Images by true and predicted class. Empty cells are not drawn: of a thousand classes there are a million."""
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
            strength = 0.12 + 0.6 * share if share <= 0.5 else 0.5 + 0.5 * share  # nothing that hides black and white
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
    told = f"{sum(row[k] for k, row in enumerate(matrix))} of {sum(map(sum, matrix))} images right"
    svg = _svg("Confusion matrix", told, left + side + 2, below + 22, "".join(drawing))
    legend = [(_area(SWATCH, name), LOOKS[name][0]) for name in ("right", "wrong")]
    return _figure("Confusion matrix", svg, legend, wide=wide)


def _plot(title: str, told: Iterable[str], x: Axis, y: Axis, drawing: str) -> str:
    """A drawing between its axes; `told` is for who cannot see it."""
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


def _svg(title: str, told: str, width: float, height: float, drawing: str) -> str:
    label = escape(f"{title}: {told}")
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px"'
    return f'<svg class="plot" {size} role="img" aria-label="{label}">{drawing}</svg>'


def _text(x: float, y: float, text: str, look: str, turn: int = 0, size: float = 12) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}"{turned}>{escape(text)}</text>'


def _path(d: str, name: str) -> str:
    _, colour, dashes = LOOKS[name]
    return f'<path class="line {colour}" stroke-dasharray="{dashes}" d="{d}"/>'


def _area(d: str, name: str, told: str = "", strength: float = 1.0) -> str:
    title = f"<title>{escape(told)}</title>" if told else ""
    return f'<path class="area {LOOKS[name][1]}" opacity="{strength:.2f}" d="{d}">{title}</path>'


def _box(left: float, bottom: float, right: float, top: float) -> str:
    return f"M{left:.1f} {bottom:.1f}H{right:.1f}V{top:.1f}H{left:.1f}z"


SWATCH = _box(5, 12, 19, 0)
STYLE = """
:root { --ground: #fff; --tile: #f4f6f8; --ink: #1c2024; --quiet: #59626c; --rule: #dfe4e9; --axis: #8a949e;
  --blue: #1878c8; --red: #b32d00; --green: #0a9a78; --purple: #7d1d80; --ochre: #c78a00; --grey: #7b858f;
  --halo: #1c202433; --right: #0b5fa5; --wrong: #b32d00; --bad: #fdebe5; --poor: #fdf4dc; --note: #e8f2fb }
@media screen and (prefers-color-scheme: dark) { :root {
  --ground: #15181c; --tile: #1e2328; --ink: #e9ecef; --quiet: #a3adb7; --rule: #2c333a; --axis: #6b7680;
  --blue: #4da3f5; --red: #f2703d; --green: #2fae8e; --purple: #e3a3dc; --ochre: #f0dc6a; --grey: #8a949e;
  --halo: #ffffff40; --right: #1f72bb; --wrong: #b8451c; --bad: #43231a; --poor: #3b321a; --note: #1b2f42 } }
body { margin: 0 auto; padding: 32px 24px; max-width: 1040px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: break-word;
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
h1 { margin: 0 0 8px; font-size: 28px; line-height: 1.2 } h2 { margin: 0 0 8px; font-size: 16px } p { margin: 6px 0 }
.quiet, dt, dd, .legend { color: var(--quiet); font-size: 13px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 20px 0 }
.tiles div { padding: 10px 12px; background: var(--tile); border-radius: 8px } dd { margin: 0 }
dd b { display: block; color: var(--ink); font-size: 22px; line-height: 1.4 }
aside { margin: 10px 0; padding: 10px 16px; border-left: 4px solid; border-radius: 4px }
aside ul { margin: 2px 0; padding-left: 18px } aside li:only-child { margin-left: -18px; list-style: none }
.bad { background: var(--bad); border-color: var(--red) } .poor { background: var(--poor); border-color: var(--ochre) }
.note { background: var(--note); border-color: var(--blue) }
.plots { display: grid; gap: 36px 40px; margin: 32px 0 }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.tables { columns: 2 400px; column-gap: 40px; margin-bottom: 24px }
.tables > * { margin-bottom: 32px; break-inside: avoid }
section { break-inside: avoid } .wide { grid-column: 1 / -1 } .plot { display: block; width: 100%; overflow: visible }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0; padding: 0; list-style: none }
.legend svg { margin-right: 7px; vertical-align: -1px }
text { fill: var(--quiet) } .end { text-anchor: end } .middle { text-anchor: middle }
.number { fill: var(--ink) } .strong { fill: #fff } summary + * { margin-top: 12px }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round } .halo { stroke-width: 9 }
.area { fill: currentColor }
.rule, .axis { fill: none; stroke: var(--rule) } .axis { stroke: var(--axis) }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 0 3px 12px; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top }
th:first-child { padding-left: 0; text-align: left; overflow-wrap: anywhere } th { font-weight: normal }
thead th { color: var(--quiet); font-size: 13px }
summary { cursor: pointer; font-weight: bold }
pre { padding: 14px; background: var(--tile); border-radius: 8px; font-size: 13px }
@media print { body { padding: 0; font-size: 13px } .plots { grid-template-columns: 1fr 1fr; gap: 20px 28px }
  .tiles { grid-template-columns: repeat(3, 1fr) } .tables { columns: 2; column-gap: 28px }
  table { font-size: 12px } details::details-content { content-visibility: visible; height: auto } }
"""
STYLE += " ".join(f".{name} {{ color: var(--{name}) }}" for name in sorted({colour for _, colour, _ in LOOKS.values()}))
