"""`python -m quality.plots`: what each regularizer does on scikit-learn's digits, as pictures for docs/explanation.

Every run is a record in `quality/results/plots.json`, so an interrupted run resumes where it stopped. Nothing is chosen
by these figures: each picture shows all strengths that were tried, and `held out` are images that no run has seen.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from serving.quiet import import_tensorflow

RESULTS = Path(__file__).parent / "results" / "plots.json"
PICTURES = Path(__file__).parent.parent / "docs" / "explanation"
SEEDS = range(4)
IMAGES = 100  # to train on, ten of each class
WRONG = 0.2  # share of labels that are replaced by others in the second line of a picture
VALIDATION_IMAGES = 300  # held-out images that stop a run or choose a temperature; figures are of the others
ATTACKED_IMAGES = 300
EPOCHS, EPSILON = 40, 0.1
PLAIN: dict[str, Any] = {"method": "full", "l2": 0.0, "dropout": 0.0, "epochs": EPOCHS}  # nothing regularizes
Figures = dict[str, Any]
# Colour-blind safe (Okabe & Ito 2008), and legible on white.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
LINES = {0.0: ("all labels right", BLUE, "o"), WRONG: (f"{WRONG:.0%} of the labels wrong", ORANGE, "s")}


@dataclass(frozen=True)
class Line:
    """A line of a sweep."""

    name: str
    colour: str
    marker: str
    wrong: float
    spec: Mapping[str, Any] = field(default_factory=dict)  # beside the strength that is swept


BOTH = tuple(Line(name, colour, marker, wrong) for wrong, (name, colour, marker) in LINES.items())
AT_CONSTANT_RATE = (
    *(replace(line, name=f"{line.name}, constant rate", spec={"schedule": "constant"}) for line in BOTH),
    replace(BOTH[1], name=f"{BOTH[1].name}, cosine", colour=GREEN, marker="^"),
)


@dataclass(frozen=True)
class Run:
    """One training: its place in the results, and what is measured."""

    spec: Mapping[str, Any]
    seed: int
    images: int = IMAGES
    wrong: float = 0.0
    measure: str = "accuracies"

    @property
    def key(self) -> str:
        """Name in the results; changes with anything that changes the outcome."""
        return json.dumps([self.measure, self.spec, self.images, self.wrong, self.seed], sort_keys=True)


@dataclass(frozen=True)
class Picture:
    """A file in docs/explanation, the runs that it needs, and how it is drawn from their figures."""

    runs: Sequence[Run]
    draw: Callable[[Callable[[Run], Figures]], Any]


def perform(run: Run) -> Figures:
    """Train and measure."""
    import numpy as np

    from quality.data import digits, mislabel, split
    from quality.rows import learn
    from trainer import evaluate
    from trainer.network import Network

    data = digits(run.images, run.seed)
    labels = data.labels.copy()
    mislabel(labels, run.wrong, 10, np.random.default_rng([run.seed, 23]))
    train = split(data.images, labels)
    order = np.random.default_rng([run.seed, 29]).permutation(len(data.test_labels))
    validation = split(data.test_images[order[:VALIDATION_IMAGES]], data.test_labels[order[:VALIDATION_IMAGES]])
    held_out = split(data.test_images[order[VALIDATION_IMAGES:]], data.test_labels[order[VALIDATION_IMAGES:]])
    fitted = learn(dict(run.spec), run.seed, train, validation, same_classes=True)
    network = Network(fitted.params)
    logits = network.logits(held_out.images)
    figures: Figures = {
        "held_out": 100 * evaluate.accuracy(logits, held_out.labels),
        "train": 100 * evaluate.accuracy(network.logits(train.images), labels),
        "zeros": 100 * evaluate.sparsity(fitted.params)["zeros"],
        "kept_epoch": fitted.kept_epoch,
        "epochs": len(fitted.history),
    }
    if run.measure == "history":
        names = ("validation_accuracy", "validation_cross_entropy")
        figures |= {name: [record[name] for record in fitted.history] for name in names}
    if run.measure == "attacked":
        figures["under_attack"] = _under_attack(fitted.params, held_out)
    if run.measure == "calibration":
        temperature = evaluate.serving_temperature(network.logits(validation.images), validation.labels)
        figures["temperature"] = temperature
        for name, scaled in (("before", logits), ("after", logits / np.float32(temperature))):
            figures[name] = evaluate.calibration(scaled, held_out.labels)
    return figures


def _under_attack(params: Any, held_out: Any) -> float:
    """Accuracy in percent under APGD on two losses, as in the report card."""
    import functools

    from trainer import report
    from trainer.fit import sample
    from trainer.network import Network

    *_, stands = report.withstood_pgd(functools.partial(Network, params), sample(held_out, ATTACKED_IMAGES), EPSILON)
    return 100 * float(stands.mean())


def sweep(
    label: str, values: Sequence[float], spec_of: Callable[[float], Mapping[str, Any]], lines: Sequence[Line] = BOTH
) -> Picture:
    """Accuracy and gap against a strength, by default with all labels right and with some wrong."""
    runs = {
        (value, line.name, seed): Run(
            {**PLAIN, **line.spec, **(spec_of(value) if value else {})}, seed, wrong=line.wrong
        )
        for value in values for line in lines for seed in SEEDS
    }  # fmt: skip

    def draw(found: Callable[[Run], Figures]) -> Any:
        figure, (left, right) = _panels(2)
        for line in lines:
            cells = [[found(runs[value, line.name, seed]) for seed in SEEDS] for value in values]
            accuracy = [[cell["held_out"] for cell in row] for row in cells]
            gap = [[cell["train"] - cell["held_out"] for cell in row] for row in cells]
            for axes, series in ((left, accuracy), (right, gap)):
                _line(axes, [f"{value:g}" for value in values], series, line.name, line.colour, line.marker)
        left.set(xlabel=label, ylabel="accuracy, held out (%)")
        right.set(xlabel=label, ylabel="gap: training minus held out")
        right.axhline(0, color=GREY, linewidth=0.8)
        left.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return figure

    return Picture(list(runs.values()), draw)


def stopping() -> Picture:
    """Accuracy and cross-entropy on validation images in every epoch, and where early stopping ends."""
    patient = {"early_stopping": {"patience": 5}}
    whole = {(wrong, seed): Run(PLAIN, seed, wrong=wrong, measure="history") for wrong in LINES for seed in SEEDS}
    short = {
        (wrong, seed): Run({**PLAIN, **patient}, seed, wrong=wrong, measure="history")
        for wrong in LINES for seed in SEEDS
    }  # fmt: skip

    def draw(found: Callable[[Run], Figures]) -> Any:
        figure, (left, right) = _panels(2)
        epochs = range(1, EPOCHS + 1)
        for wrong, (name, colour, _) in LINES.items():
            cells, stopped = ([found(runs[wrong, seed]) for seed in SEEDS] for runs in (whole, short))
            for axes, key, factor in ((left, "validation_accuracy", 100), (right, "validation_cross_entropy", 1)):
                means = [factor * statistics.mean(cell[key][epoch - 1] for cell in cells) for epoch in epochs]
                axes.plot(epochs, means, color=colour, label=name)
                for number, cell in enumerate(stopped):
                    end = cell["kept_epoch"]
                    label = "epochs that early stopping keeps" if wrong and not number else None
                    axes.plot(end, factor * cell[key][end - 1], "v", color=colour, markersize=6, label=label)
        left.set(xlabel="epoch", ylabel="validation accuracy (%)")
        right.set(xlabel="epoch", ylabel="validation cross-entropy (nats)")
        left.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return figure

    return Picture([*whole.values(), *short.values()], draw)


def attacks() -> Picture:
    """Accuracy with and without an attack, for each kind of adversarial training."""
    specs: dict[str, Mapping[str, Any]] = {"none": {}}
    specs |= {name: {"adversarial": {"attack": name, "epsilon": EPSILON}} for name in ("fgsm", "pgd", "trades", "free")}
    specs["vat"] = {"adversarial": {"attack": "vat"}}
    runs = {
        (name, seed): Run({**PLAIN, **spec}, seed, measure="attacked") for name, spec in specs.items() for seed in SEEDS
    }

    def draw(found: Callable[[Run], Figures]) -> Any:
        figure, (axes,) = _panels(1)
        for offset, key, label, colour in (
            (-0.2, "held_out", "without an attack", BLUE),
            (0.2, "under_attack", f"under APGD, ε = {EPSILON}", ORANGE),
        ):
            cells = [[found(runs[name, seed])[key] for seed in SEEDS] for name in specs]
            bars = axes.bar(
                [place + offset for place in range(len(specs))], [statistics.mean(row) for row in cells], width=0.38,
                yerr=[statistics.stdev(row) for row in cells], color=colour, label=label, ecolor="black", capsize=2,
            )  # fmt: skip
            axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_xticks(range(len(specs)), list(specs))
        axes.set(xlabel="adversarial training", ylabel="accuracy, held out (%)", ylim=(0, 112))
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return figure

    return Picture(list(runs.values()), draw)


def methods() -> Picture:
    """Accuracy of every method against the number of images."""
    names = ("full", "lora", "adapter", "ia3", "bias", "head")
    counts = (30, 100, 300, 900)
    runs = {
        (name, count, seed): Run({"method": name, "epochs": EPOCHS}, seed, images=count)
        for name in names for count in counts for seed in SEEDS
    }  # fmt: skip

    def draw(found: Callable[[Run], Figures]) -> Any:
        figure, (left, right) = _panels(2)
        looks = zip(names, (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "black"), "os^Dvx", strict=True)
        for name, colour, marker in looks:
            cells = [[found(runs[name, count, seed]) for seed in SEEDS] for count in counts]
            where = [str(count) for count in counts]
            _line(left, where, [[cell["held_out"] for cell in row] for row in cells], name, colour, marker)
            gaps = [[cell["train"] - cell["held_out"] for cell in row] for row in cells]
            _line(right, where, gaps, name, colour, marker)
        left.set(xlabel="images to train on", ylabel="accuracy, held out (%)")
        right.set(xlabel="images to train on", ylabel="gap: training minus held out")
        left.legend(frameon=False, ncols=2)
        return figure

    return Picture(list(runs.values()), draw)


def reliability() -> Picture:
    """Accuracy against confidence before and after the temperature."""
    runs = {(wrong, seed): Run(PLAIN, seed, wrong=wrong, measure="calibration") for wrong in LINES for seed in SEEDS}

    def draw(found: Callable[[Run], Figures]) -> Any:
        figure, panels = _panels(2)
        for axes, (wrong, (name, _, _)) in zip(panels, LINES.items(), strict=True):
            cells = [found(runs[wrong, seed]) for seed in SEEDS]
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
            for key, colour, marker in (("before", ORANGE, "s"), ("after", BLUE, "o")):
                error = 100 * statistics.mean(cell[key]["expected_calibration_error"] for cell in cells)
                points = _pooled([cell[key]["bins"] for cell in cells])
                label = f"{key}: calibration error {error:.1f}%"
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
            axes.set(xlabel="confidence", ylabel="accuracy, held out", title=name, xlim=(0.2, 1.02), ylim=(0, 1.02))
            axes.legend(frameon=False, loc="upper left")
        return figure

    return Picture(list(runs.values()), draw)


def _pooled(bins: Sequence[Sequence[Mapping[str, float]]]) -> list[tuple[float, float]]:
    """Confidence and accuracy of every bin with at least 20 images, over all runs."""
    points = []
    for same in zip(*bins, strict=True):
        images = sum(one["images"] for one in same)
        if images >= 20:
            parts = [one for one in same if one["images"]]
            means = [sum(one[key] * one["images"] for one in parts) / images for key in ("confidence", "accuracy")]
            points.append((means[0], means[1]))
    return points


def _panels(count: int) -> tuple[Any, Sequence[Any]]:
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 10, "svg.hashsalt": "temper", "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = plt.subplots(1, count, figsize=(8.0 if count > 1 else 6.5, 3.6), layout="constrained", squeeze=False)
    for one in axes[0]:
        one.grid(axis="y", color="#dddddd", linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes[0]


def _line(
    axes: Any, where: Sequence[str], series: Sequence[Sequence[float]], name: str, colour: str, marker: str
) -> None:
    """Means of some values at each place, with the standard deviation."""
    means, spreads = [statistics.mean(row) for row in series], [statistics.stdev(row) for row in series]
    axes.errorbar(where, means, yerr=spreads, label=name, color=colour, marker=marker, markersize=5, capsize=3)


ALPHAS = (0, 1e-3, 1e-2, 1e-1, 1)
ALL: dict[str, Callable[[], Picture]] = {
    "l1": lambda: sweep("l1 (lambda)", (0, 1e-5, 1e-4, 1e-3, 1e-2), lambda value: {"l1": value}),
    "l2": lambda: sweep("l2 (alpha)", ALPHAS, lambda value: {"l2": value}),
    "l2_sp": lambda: sweep("l2_sp (alpha)", ALPHAS, lambda value: {"l2_sp": value}),
    "dropout": lambda: sweep("dropout", (0, 0.2, 0.4, 0.6, 0.8), lambda value: {"dropout": value}),
    "label_smoothing": lambda: sweep(
        "label_smoothing", (0, 0.1, 0.2, 0.4, 0.6), lambda value: {"label_smoothing": value}
    ),
    "mixup": lambda: sweep("mixup", (0, 0.1, 0.3, 1, 3), lambda value: {"mixup": value}),
    "augmentation": lambda: sweep(
        "augmentation.shift (pixels)", (0, 1, 2, 4, 6), lambda value: {"augmentation": {"shift": float(value)}}
    ),
    "ema": lambda: sweep("ema", (0, 0.9, 0.97, 0.99, 0.997), lambda value: {"ema": value}, AT_CONSTANT_RATE),
    "early_stopping": stopping,
    "adversarial": attacks,
    "methods": methods,
    "calibrate": reliability,
}


def save(picture: Picture, path: Path, found: Mapping[str, Figures]) -> None:
    """Draw a picture as SVG, the same file for the same results."""
    import matplotlib.pyplot as plt

    figure = picture.draw(lambda run: found[run.key])
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def results() -> dict[str, Figures]:
    """What has been measured, by the keys of the runs."""
    if not RESULTS.is_file():
        return {}
    found: dict[str, Figures] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def _missing(names: Sequence[str], found: Mapping[str, Figures]) -> Iterator[Run]:
    runs = {run.key: run for name in names for run in ALL[name]().runs}
    return (run for key, run in runs.items() if key not in found)


@click.command()
@click.argument("names", metavar="[PICTURE]...", nargs=-1)
@click.option("--again", is_flag=True, help="Also measure what has a result.")
def main(names: tuple[str, ...], again: bool) -> None:
    """Measure what is missing, and draw the pictures, by default all of them."""
    import_tensorflow()
    import matplotlib

    from trainer.parallel import side_by_side

    matplotlib.use("svg")
    if unknown := set(names) - set(ALL):
        raise click.UsageError(f"unknown pictures: {', '.join(sorted(unknown))}; choose from {', '.join(ALL)}")
    chosen, found = names or tuple(ALL), results()
    missing = list(_missing(chosen, {} if again else found))
    for done, (run, figures) in enumerate(side_by_side(lambda run, check: perform(run), missing), start=1):
        found[run.key] = figures
        part = RESULTS.with_suffix(".part")
        lines = (f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found))
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        part.rename(RESULTS)
        click.echo(f"{done} of {len(missing)}: {run.key}: {figures['held_out']:.1f}")
    for name in chosen:
        save(ALL[name](), PICTURES / f"{name}.svg", found)
        click.echo(f"{name}.svg written")


if __name__ == "__main__":
    main()
