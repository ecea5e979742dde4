"""A version's report card as an HTML page that needs nothing else: no script, no font, no other host.

Only the standard library, for the gateway's memory is small. Helpers take plain text, which they escape, and return
markup; markup that they take is called `drawing`, `markup` or `legend`.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from api.report.charts import (
    LOOKS,
    MANY,
    Json,
    confusion_plot,
    gradient_share_plot,
    line_plot,
    linear,
    logarithmic,
    percent,
    reliability_plot,
    section,
    series,
)

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
        tiles.append(("Validation accuracy", percent(found["accuracy"]), note))
    if found := report.get("generalization_gap"):
        note = f"percentage points; in cross-entropy {found['cross_entropy']:+z.2g} nats"
        tiles.append(("Generalization gap", f"{100 * found['accuracy']:+z.1f} pp", note))
    if found := report.get("calibration"):
        note = "ECE: mean distance of confidence and accuracy"
        tiles.append(("Calibration error", f"{found['expected_calibration_error']:.1%}", note))
    if found := report.get("robustness"):
        size, doubt = found["epsilon"], "not to be trusted: " if found.get("gradient_masking") else ""
        title = f"{found['attack'].upper()}, ε = {size:g}"
        tiles.append((title, percent(found["accuracy"]), f"{doubt}accuracy under attack"))
        worst = next((percent(point["worst"]) for point in found.get("curve", ()) if point["epsilon"] == size), "…")
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
    if doubts := report.get("warnings"):
        yield _notice("bad", "Before you rely on it", *doubts)
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
        epochs = linear("epoch", 1, len(history), least=1)
        marks = {"kept": training.get("kept_epoch"), "overfitted": training.get("overfitted_attack_in_epoch")}
        losses = series(history, "epoch", [name for name in LOOKS if "accuracy" not in name])
        loss = logarithmic("loss in nats, log scale", [y for points in losses.values() for _, y in points])
        yield line_plot("Loss by epoch", epochs, loss, losses, marks, "Training terms are means over the epoch.")
        shares = series(history, "epoch", [name for name in LOOKS if name.startswith("validation_accuracy")])
        least = min([0.9, *(y for points in shares.values() for _, y in points)])
        right = linear("validation images right", math.floor(10 * least) / 10, 1, percent=True)
        note = "The attacks of every epoch are quick, and on some of the images." if len(shares) > 1 else ""
        yield line_plot("Accuracy by epoch", epochs, right, shares, marks, note)
    if gradient_shares := (report.get("regularization") or {}).get("epochs"):
        yield gradient_share_plot(gradient_shares)
    if curve := robustness.get("curve"):
        sizes = linear("ε, the largest change of a pixel (0 to 1)", 0, max(point["epsilon"] for point in curve))
        right = linear("validation images right", 0, 1, percent=True)
        attacks = series(curve, "epsilon", ("worst", "fgsm", "pgd", "square"))
        settings = ", ".join(f"{name} {value}" for name, value in _flat(robustness.get("settings") or {}))
        note = f"On {robustness['images']:,} validation images; {settings}."
        note = f"Not to be trusted: gradients are masked. {note}" if robustness.get("gradient_masking") else note
        yield line_plot("Robustness", sizes, right, attacks, {"epsilon": robustness["epsilon"]}, note)
    if bins := (report.get("calibration") or {}).get("bins"):
        yield reliability_plot(bins)
    if matrix := (report.get("validation") or {}).get("confusion_matrix"):
        yield confusion_plot(matrix, manifest["classes"])


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
        rows = [(f"fold {number}", percent(share)) for number, share in enumerate(across["folds"], start=1)]
        rows.append(("all images", f"{percent(across['accuracy'])} ({_interval(across)})"))
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
        rows = [(manifest["base"], percent(found["base"])), ("this version", percent(found["accuracy"]))]
        rows.append(("lost", f"{100 * found['lost']:.1f} points"))
        note = f"On {found['images']:,} images of the base's own task: {found['sample']}."
        yield _table("Forgetting", ("", "accuracy"), rows, note)
    else:
        gone = "forgetting" in report and "curve" in (report.get("robustness") or {})
        text = "Nothing is there any more to measure it on." if gone else "Still being worked out."
        yield section("Forgetting", "", text)
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
    return section(title, f"<table>{header}<tbody>{''.join(lines)}</tbody></table>", note)


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
