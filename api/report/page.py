"""A version's report card as an HTML page that needs nothing else: no script, no font, no other host.

This module decides what the page says; `templates/report.html` how it looks, and escapes all of it.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from api.report.charts import (
    LOOKS,
    MANY,
    Figure,
    Json,
    confusion_plot,
    front_plot,
    gradient_share_plot,
    line_plot,
    linear,
    logarithmic,
    percent,
    reliability_plot,
    search_plot,
    series,
)
from store.records import Manifest, ReportCard
from trainer.spec import OPTIONS

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
PICTURES = 24  # of each kind that a page shows
NO_ZEROS = (
    "L1 promised no exact zeros in {}: the method trains these kernels only through other parameters, so L1 is a "
    "subgradient on the effective kernel there. It makes weights smaller but does not stop them at zero."
)


@dataclass(frozen=True)
class Tile:
    """A figure that matters most."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Notice:
    """What to know before believing the rest. `kind` is bad, poor or note."""

    kind: str
    title: str
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; without rows only its note is shown."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """An image with what is to be said of it. `source` is a data URL, empty if the image is gone."""

    source: str
    name: str
    note: str


@dataclass(frozen=True)
class Gallery:
    """Images of one kind, the most telling ones first."""

    title: str
    note: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Link:
    """A link to another version's page."""

    text: str
    target: str


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    subtitle: str = ""
    links: Sequence[Link] = ()
    tiles: Sequence[Tile] = ()
    notices: Sequence[Notice] = ()
    figures: Sequence[Figure] = ()
    galleries: Sequence[Gallery] = ()
    tables: Sequence[Table] = ()
    spec: str = ""


def report_page(
    name: str, version: int, card: ReportCard, about: Manifest, *, created_at: float | None = None,
    versions: Sequence[int] = (), images: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> str:  # fmt: skip
    """A version's report card as an HTML page.

    Args:
        card: complete or not yet.
        about: what the version is.
        created_at: Unix seconds.
        versions: of the model, all that are live.
        images: prepared images (n, 28, 28) uint8 of its data set, by part: "", `validation` and `test`.
    """
    report, manifest = card.dump(), about.dump()
    title = f"{name}:{version}"
    links = list(_links(name, version, versions, report, manifest))
    if manifest.get("base") is None:
        page = Page(title, tables=[Table("Card", rows=list(_flat(report)))])
    else:
        spec = about.trained_with
        page = Page(
            title, _subtitle(manifest, spec, created_at), links, list(_tiles(report)),
            [*_notices(report), *_corrections(report), *_about_data(about)], list(_figures(report, manifest)),
            list(_galleries(report.get("inspection") or {}, images)), list(_tables(report, manifest)),
            json.dumps(spec, indent=2, ensure_ascii=False),
        )  # fmt: skip
    return _TEMPLATES.get_template("report.html").render(page=page)


def _links(name: str, version: int, versions: Sequence[int], report: Json, manifest: Json) -> Iterator[Link]:
    """The versions before and after it, what it was compared with, and what it started from."""
    base, _, number = str(manifest.get("base") or "").partition(":")
    found = {
        "previous": max((other for other in versions if other < version), default=None),
        "next": min((other for other in versions if other > version), default=None),
        "compared with": (report.get("gate") or {}).get("compared_with"),
    }
    for text, other in found.items():
        if other in versions:
            yield Link(f"{text}: {name}:{other}", f"/models/{name}/versions/{other}/report")
    if number:
        yield Link(f"from: {base}:{number}", f"/models/{base}/versions/{number}/report")


def _subtitle(manifest: Json, spec: Json, created_at: float | None) -> str:
    dataset = manifest.get("dataset") or {}
    method = spec.get("method", "fine-tuned")
    given = spec.get(method) if method in OPTIONS else None
    options = ", ".join(f"{key} {value}" for key, value in _flat(given or {}))
    parts = [f"from {manifest['base']} by {method}" + (f" ({options})" if options else "")]
    if origin := manifest.get("checkpoint"):
        parts.append(f"the checkpoint of epoch {origin['epoch']} of {origin['job']}")
    if dataset:
        images = f"{dataset['images']:,} images of {len(manifest['classes'])} classes"
        parts.append(f"{images} in {dataset.get('filename') or 'an upload'}")
    parts.append(str(manifest.get("polarity", "")).replace("_", " "))
    if created_at is not None:
        parts.append(f"made on {datetime.fromtimestamp(created_at, UTC):%d %B %Y at %H:%M} UTC")
    return " · ".join(filter(None, parts))


def _tiles(report: Json) -> Iterator[Tile]:
    if found := report.get("validation"):
        note = f"95% interval {_interval(found)}, {found['images']:,} images"
        if base := report.get("base"):
            note += f"; the base: {percent(base['accuracy'])}"
        title = "Out-of-fold accuracy" if found.get("out_of_fold") else "Validation accuracy"
        yield Tile(title, percent(found["accuracy"]), note)
    if found := report.get("test"):
        error = f"calibration error {found['expected_calibration_error']:.1%}"
        note = f"95% interval {_interval(found)}, {found['images']:,} images; {error}"
        yield Tile("Test accuracy", percent(found["accuracy"]), note)
    if found := report.get("generalization_gap"):
        note = f"percentage points; in cross-entropy {found['cross_entropy']:+z.2g} nats"
        yield Tile("Generalization gap", f"{100 * found['accuracy']:+z.1f} pp", note)
    if found := report.get("calibration"):
        note = "ECE: mean gap between confidence and accuracy"
        yield Tile("Calibration error", f"{found['expected_calibration_error']:.1%}", note)
    if found := report.get("robustness"):
        size, doubt = found["epsilon"], "do not trust: " if found.get("gradient_masking") else ""
        title = f"{found['attack'].upper()}, ε = {size:g}"
        yield Tile(title, percent(found["accuracy"]), f"{doubt}accuracy under attack")
        worst = next((percent(point["worst"]) for point in found.get("curve", ()) if point["epsilon"] == size), "…")
        note = "not measured yet" if worst == "…" else f"{doubt}accuracy under FGSM, PGD and Square"
        yield Tile(f"Worst case, ε = {size:g}", worst, note)
    if found := report.get("parameters"):
        note = f"of {found['total']:,} ({found['trained'] / found['total']:.1%})"
        yield Tile("Trained parameters", f"{found['trained']:,}", note)


def _notices(report: Json) -> Iterator[Notice]:
    training, robustness = report.get("training") or {}, report.get("robustness") or {}
    ended, kept = training.get("ended_by"), f"the weights of epoch {training.get('kept_epoch')} are kept"
    if reasons := robustness.get("gradient_masking"):
        yield Notice("bad", "Do not trust the robustness figures: gradients are masked", reasons)
    if ended == "catastrophic_overfitting":
        text = "the model resisted one-step attacks but no longer multi-step ones"
        text = f"Training ended in epoch {training.get('overfitted_attack_in_epoch')}: {text}; {kept}."
        yield Notice("bad", "Catastrophic overfitting of the attack", [text])
    if sentence := (report.get("search") or {}).get("sentence"):
        yield Notice("note", "How it was regularized", [sentence.replace("`", "")])
    gate = report.get("gate") or {}
    if failed := [one["message"] for one in gate.get("conditions", ()) if not one["passed"]]:
        given = " and ".join(dict.fromkeys(one["label"] for one in gate.get("overrides", ())))
        outcome = f"got the label {given} by an override" if given else "went live without its label"
        yield Notice("bad", f"It failed its gate and {outcome}", failed)
    unsure = [one["message"] for one in gate.get("conditions", ()) if one.get("doubt")]
    if doubts := [*report.get("warnings", ()), *unsure]:
        yield Notice("bad", "Before you rely on it", doubts)
    if warnings := (report.get("regularization") or {}).get("warnings"):
        yield Notice("poor", "Regularization", [warning["message"] for warning in warnings])
    if ended == "early_stopping":
        yield Notice("note", "Early stopping", [f"Training ended after epoch {training['epochs']}; {kept}."])
    if "curve" not in robustness:
        text = "Accuracy under PGD and Square, signs of gradient masking, and forgetting of the base's task."
        yield Notice("note", "Not measured yet", [text])


def _corrections(report: Json) -> Iterator[Notice]:
    if found := report.get("corrections"):
        how = "by networks that were not trained on them" if found["out_of_fold"] else "which it was trained on"
        text = f"{found['right']:,} of {found['images']:,} are classified right now, {how}; {found['right_before']:,} "
        yield Notice("note", "Corrected images", [f"{text}were before."])


def _about_data(about: Manifest) -> Iterator[Notice]:
    if about.dataset and (warnings := about.dataset.warnings):
        yield Notice("poor", "About the data", warnings)


def _figures(report: Json, manifest: Json) -> Iterator[Figure]:
    training, robustness = report.get("training") or {}, report.get("robustness") or {}
    if history := report.get("history"):
        epochs = linear("epoch", 1, len(history), least=1)
        marks = {"kept": training.get("kept_epoch"), "overfitted": training.get("overfitted_attack_in_epoch")}
        losses = series(history, "epoch", [name for name in LOOKS if "accuracy" not in name])
        loss = logarithmic("loss in nats, log scale", [y for points in losses.values() for _, y in points])
        yield line_plot("Loss by epoch", epochs, loss, losses, marks, "Training terms are means over the epoch.")
        shares = series(history, "epoch", [name for name in LOOKS if name.startswith("validation_accuracy")])
        if shares:  # all images may have been trained on
            least = min([0.9, *(y for points in shares.values() for _, y in points)])
            right = linear("validation accuracy", math.floor(10 * least) / 10, 1, percent=True)
            note = "The attacks in every epoch are quick ones, on a sample of the images." if len(shares) > 1 else ""
            yield line_plot("Accuracy by epoch", epochs, right, shares, marks, note)
    if trials := [one for one in (report.get("search") or {}).get("trials", ()) if one["scores"]]:
        found = report["search"]
        yield search_plot(trials, found["chosen"])
        measured = [one for one in trials if one["scores"][-1].get("objectives")]
        for objective in list(measured[0]["scores"][-1]["objectives"])[1:] if measured else ():
            yield front_plot(measured, objective, found["chosen"], found["front"])
    if gradient_shares := (report.get("regularization") or {}).get("epochs"):
        yield gradient_share_plot(gradient_shares)
    if curve := robustness.get("curve"):
        sizes = linear("ε, the largest change of a pixel (0 to 1)", 0, max(point["epsilon"] for point in curve))
        right = linear("validation accuracy", 0, 1, percent=True)
        attacks = series(curve, "epsilon", ("worst", "fgsm", "pgd", "square"))
        settings = ", ".join(f"{name} {value}" for name, value in _flat(robustness.get("settings") or {}))
        note = f"On {robustness['images']:,} validation images; {settings}."
        note = f"Do not trust: gradients are masked. {note}" if robustness.get("gradient_masking") else note
        yield line_plot("Robustness", sizes, right, attacks, {"epsilon": robustness["epsilon"]}, note)
    if bins := (report.get("calibration") or {}).get("bins"):
        yield reliability_plot(bins)
    if matrix := (report.get("validation") or {}).get("confusion_matrix"):
        yield confusion_plot(matrix, manifest["classes"])


def _galleries(found: Json, images: Mapping[str, np.ndarray]) -> Iterator[Gallery]:
    """Images that are worth a look."""

    def gallery(title: str, listed: Sequence[Json], say: Callable[[Json], str], note: str = "") -> Iterator[Gallery]:
        if listed:
            more = f" {len(listed) - PICTURES:,} more are in the JSON." if len(listed) > PICTURES else ""
            pictures = [Picture(_source(one, images), _name(one), say(one)) for one in listed[:PICTURES]]
            yield Gallery(title, f"{note}{more}".strip(), pictures)

    if errors := found.get("label_errors"):
        note = (
            f"By networks that were not trained on them; about {errors['estimated_share']:.0%} of the "
            f"{errors['checked']:,} labels may be wrong. Correct them, or fine-tune again with `exclude`."
        ).replace("`", "")
        yield from gallery(
            "Labels that are probably wrong", errors["listed"],
            lambda one: f"labelled {one['class']}, rather {one['suggested']} ({one['probability']:.0%})", note,
        )  # fmt: skip
    yield from gallery(
        "Corrected by users",
        found.get("corrections") or (),
        lambda one: f"{one['class']}, taken for {one['before']} before, for {one['predicted']} now",
    )
    yield from gallery(
        "Copies of images that are trained on",
        (found.get("leaks") or {}).get("listed") or (),
        lambda one: f"{one['class']}, a copy of {_name(one['copy_of'])}",
        "They are left out of every figure.",
    )
    if copies := found.get("copies"):
        note = f"{copies['images']:,} images in {copies['groups']:,} groups; each group is held out as a whole."
        if several := copies["of_several_classes"]:
            note += f" {several:,} of the groups are of more than one class."
        listed = [{**one, "group": number} for number, group in enumerate(copies["listed"], start=1) for one in group]
        yield from gallery("Near copies", listed, lambda one: f"group {one['group']}: {one['class']}", note)
    yield from gallery(
        "Unlike all others",
        (found.get("strangers") or {}).get("listed") or (),
        lambda one: f"{one['class']}, isolated by {one['isolation']:.2f} of 1",
        "Images that do not belong here, or the only ones of their kind.",
    )
    yield from gallery(
        "Misclassified, the surest first",
        found.get("misclassified") or (),
        lambda one: f"{one['class']}, taken for {one['predicted']} ({one['probability']:.0%})",
    )
    yield from gallery(
        "Right, but least certain",
        found.get("least_certain") or (),
        lambda one: f"{one['class']} ({one['probability']:.0%})",
    )


def _name(image: Json) -> str:
    return str(image["file"]) if "file" in image else f"image {image['index']}"


def _source(image: Json, images: Mapping[str, np.ndarray]) -> str:
    """The image as a data URL."""
    pixels = images.get(image.get("part", ""))
    if pixels is None or image["position"] >= len(pixels):
        return ""
    file = io.BytesIO()
    Image.fromarray(pixels[image["position"]]).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _tables(report: Json, manifest: Json) -> Iterator[Table]:
    if found := (report.get("validation") or {}).get("classification_report"):
        every = [*found["classes"].items(), ("mean", found["macro avg"]), ("mean by support", found["weighted avg"])]
        rows = [
            (name, *(f"{one[score]:.3f}" for score in ("precision", "recall", "f1-score")), f"{one['support']:.0f}")
            for name, one in every
        ]
        scores = ("", "precision", "recall", "F1", "support")
        yield Table("Classes", scores, rows, folded=len(found["classes"]) > MANY)
    if (found := report.get("gate")) and found["conditions"]:
        rows = [
            (one["condition"].replace("_", " "), _share(one["limit"]), _share(one["value"]),
             "yes" if one["passed"] else "no", one["message"])
            for one in found["conditions"]
        ]  # fmt: skip
        yield Table("Gate", ("", "limit", "measured", "passed", ""), rows)
    if found := report.get("twin"):
        yield _twin_table(found)
    if found := report.get("abstention"):
        yield _abstention_table(found)
    if found := (report.get("inspection") or {}).get("overlaps"):
        rows = [(" and ".join(one["classes"]), f"{one['images']:,}", f"{one['share']:.1%}") for one in found]
        note = "Held-out images of either class that were taken for the other."
        yield Table("Classes that overlap", ("", "images", "share"), rows, note)
    if found := report.get("search"):
        yield from _search_tables(found)
    if across := report.get("cross_validation"):
        rows = [(f"fold {number}", percent(share)) for number, share in enumerate(across["folds"], start=1)]
        rows.append(("all images", f"{percent(across['accuracy'])} ({_interval(across)})"))
        note = f"Each of {across['images']:,} images was held out once; 95% interval."
        yield Table("Cross-validation", ("", "accuracy"), rows, note)
    if bins := (report.get("calibration") or {}).get("bins"):
        rows = [
            (f"{one['lower']:.0%} to {one['upper']:.0%}", f"{one['images']:,}")
            + tuple(f"{one[key]:.1%}" for key in ("confidence", "accuracy"))
            for one in bins if one["images"]
        ]  # fmt: skip
        note = "By highest probability; empty ranges are left out."
        yield Table("Calibration", ("confidence", "images", "mean confidence", "accuracy"), rows, note)
    if found := report.get("sparsity"):
        exact, shrunk = found.get("exact_zeros_in", ()), found.get("shrunk_without_zeros", ())
        promises = dict.fromkeys(exact, "exact zeros") | dict.fromkeys(shrunk, "no exact zeros")
        shares = {**found["by_layer"], "all": found["zeros"]}
        columns = 3 if promises else 2  # L1 may be off
        rows = [(layer, f"{share:.2%}", promises.get(layer, ""))[:columns] for layer, share in shares.items()]
        head = ("kernel", "exact zeros", "promised by L1")[:columns]
        yield Table("Sparsity", head, rows, NO_ZEROS.format(", ".join(shrunk)) if shrunk else "")
    if found := report.get("forgetting"):
        rows = [(manifest["base"], percent(found["base"])), ("this version", percent(found["accuracy"]))]
        rows.append(("lost", f"{100 * found['lost']:.1f} points"))
        note = f"On {found['images']:,} images of the base's own task: {found['sample']}."
        yield Table("Forgetting", ("", "accuracy"), rows, note)
    else:
        gone = "forgetting" in report and "curve" in (report.get("robustness") or {})
        text = "There is no data left to measure it on." if gone else "Not measured yet."
        yield Table("Forgetting", note=text)
    if found := report.get("cost"):
        rows = [(stage, f"{seconds:,g} s") for stage, seconds in found["seconds"].items()]
        sizes = {key: found[key] for key in found if key.endswith("_bytes")}
        rows += [(key.removesuffix("_bytes").replace("_", " "), f"{size / 1e6:,.0f} MB") for key, size in sizes.items()]
        if found["images_per_second"]:  # nothing is trained to publish a checkpoint
            rows.append(("training images per second", f"{found['images_per_second']:,}"))
        yield Table("Cost", ("", ""), rows, f"On {report.get('device', 'an unknown device')}.")


def _twin_table(twin: Json) -> Table:
    rows = []
    for name, difference in twin["differences"].items():
        value, (low, high) = difference["value"], difference["interval"]
        words = name.replace("_", " ").replace("expected ", "")
        rows.append(
            (
                words,
                f"{twin[name] + value:.1%}",
                f"{twin[name]:.1%}",
                f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
            )
        )
    note = (
        "The twin is the same network on the same images for as long, without any regularizer. Both are calibrated by "
        "the other half of the images. Percentage points, with 95% intervals for the same images."
    )
    return Table("What regularization changed", ("", "this version", "twin", "difference"), rows, note)


def _abstention_table(found: Json) -> Table:
    rows = [("images held out", f"{found['images']:,}")]
    if found.get("coverage") is not None:
        low, high = found["coverage_interval"]
        rows += [
            ("sets have the right class", f"{found['coverage']:.1%} of the time ({low:.1%} to {high:.1%})"),
            ("classes in a set, on average", f"{found['mean_size']:.2f}"),
            ("sets of one class", f"{found['single']:.1%}"), ("empty sets", f"{found['empty']:.1%}"),
        ]  # fmt: skip
    rows.append(("of these images called none of these", f"{found['false_alarms']:.1%}"))
    note = "So few images were held out that coverage may turn out anywhere in the interval (95%)."
    return Table("When it abstains", ("", ""), rows, note if found.get("coverage") is not None else "")


def _search_tables(search: Json) -> Iterator[Table]:
    rows: list[tuple[Any, ...]] = []
    for one in search.get("worth", ()):
        values = _setting(one["chosen"]), _setting(one["other"])
        gain = f"{one['cross_entropy']:+.3f}", f"{100 * one['accuracy']:+.1f}"
        rows.append((one["field"].replace("_", " "), *values, *gain))
    if rows:
        note = (
            "The best trial with another value, and little else different, beside the chosen one in the first round: "
            "nats and percentage points."
        )
        yield Table("What each setting is worth", ("", "chosen", "other", "loss", "accuracy"), rows, note)
    rows = []
    for one in search.get("trials", ()):
        score = ""
        if one["scores"]:
            last = one["scores"][-1]
            score = f"{last['cross_entropy']:.3f} ± {last['standard_error']:.3f}, {percent(last['accuracy'])}"
            others = list((last.get("objectives") or {}).items())[1:]
            score += "".join(f", {name.replace('_', ' ')} {percent(value)}" for name, value in others)
        name, outcome = f"{one['trial']} {one['origin']}", one.get("dropped") or "chosen"
        rows.append((name, one["recipe"].replace("`", ""), score, outcome, f"{one['seconds']:.1f} s"))
    if rows:
        yield Table("Trials", ("", "recipe", "loss, accuracy", "outcome", "time"), rows, folded=True)


def _setting(value: Any) -> str:
    """A setting in a few words."""
    if isinstance(value, dict):
        return ", ".join(name if inner is True else f"{name} {inner:g}" for name, inner in value.items() if inner)
    if value in (None, 0):
        return "off"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _interval(score: Json) -> str:
    low, high = score["accuracy_interval"]
    return f"{low:.1%} to {high:.1%}"


def _flat(record: Json) -> Iterator[tuple[str, str]]:
    """Names and values; nested ones are named `outer: inner`."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{key}: {name}", inner) for name, inner in _flat(value))
        else:
            yield key.replace("_", " "), " ".join(map(str, value)) if isinstance(value, list) else str(value)
