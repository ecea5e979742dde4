"""`make quality`: measure what has no result yet, and write the tables of docs/quality.md.

Every result is a file, `quality/results/<row>-<seed>.json`, so an interrupted run resumes where it stopped.
"""

import json
import re
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from serving.quiet import import_tensorflow

TRUST_SEEDS = range(5, 10)  # rules were chosen on earlier drawings
RESULTS, TABLE = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "quality.md"

INTRODUCTION = """\
The results of `python -m quality rows`, in percent: the mean over the seeds and the standard deviation. Settings were
chosen on training images that were held out. `first` means the first 1,000 test images of the file, `drawn` means 1,000
drawn at random: in copies of MNIST that are sorted by class, the first are nearly all zeros.

Fashion-MNIST is Debian's package `dataset-fashion-mnist`. MNIST comes from keras.datasets, or from the file that
`TEMPER_MNIST` names. The recipes are in [`quality/rows.py`](../quality/rows.py), the single results in
[`quality/results`](../quality/results)."""
DOMAINS_INTRODUCTION = """\
The results of `python -m quality domains`: accuracy in percent on test images, the mean over the drawings (their number
in brackets) and the standard deviation. `auto` is a fine-tune without a spec. `before` is what that was before there
was a search, the next three are fixed recipes; these hold out a fifth of the images for their report. `svm` is
scikit-learn's, RBF on pixels, cross-validated. `oracle` is the best of 60 random configurations **by test accuracy**,
which no honest choice can know. The best of many is also the luckiest, so the last column is its recipe on the same
images with four other seeds. The recipes and their prior were chosen on parts of the training images.

`none` trains the same network as long with no regularization at all. `wrong-labels` is Fashion-MNIST with 30% of the
training labels replaced by others.

The files of `semeion`, `olivetti` and `coil20` are not part of the project; `TEMPER_DOMAINS` names their folder."""


TRUST_INTRODUCTION = """\
The results of `python -m quality trust`, on drawings 5 to 9, whose test images nothing was trained or chosen on; rules
and limits were chosen on drawings 0 to 4. Means, and the standard deviation over the drawings.

`covered` is the percentage of test images whose class is in the prediction set, for the default coverage of 95. So few
images are held out that it varies: `expected` is where 95% of the drawings should lie, given the numbers of held-out
and of test images, and `inside` how many of them do. `size` is the mean number of classes in a set, `empty` the
percentage of empty ones. `false alarms` is the percentage of test images that are called none of these (the limit is
set for 2), and the last columns are the percentage of other images that are: of other kinds, on average, and noise.

Coverage is above what is expected where held-out images are harder than new ones. The networks that judge them know a
fifth fewer images, which matters with five of a class (coil20); and near copies are held out together, while coil20's
test images, the same objects a few degrees on, have near copies among those that the served network has learned.

Where a tenth of the labels is wrong, it is among the held-out images, too: sets are made large enough for these, and
the right labels of the test images are in them nearly always."""
LABELS_INTRODUCTION = """\
Wrong labels: a tenth of the training labels were replaced by others, all equally likely. `named` images are called
probably wrong; precision is the share of these that are, recall the share of wrong labels that are named, in percent.
The last columns are the test accuracy of an automatic fine-tune on all images, and on those that were not named."""
GAP_INTRODUCTION = """\
The generalization gap: accuracy on the training images, with the labels that were trained on, less that on the test
images. Below zero where wrong labels were not learned."""


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Measure everything, or what a command names."""
    import_tensorflow()
    if context.invoked_subcommand is None:
        context.invoke(rows)
        context.invoke(domains)


@main.command()
@click.argument("names", metavar="[ROW]...", nargs=-1)
@click.option("--seed", type=int, help="Only this seed.")
@click.option("--again", is_flag=True, help="Also measure what has a result.")
def rows(names: tuple[str, ...] = (), seed: int | None = None, again: bool = False) -> None:
    """Accuracy and robustness of fixed recipes, by default of all rows."""
    from quality.rows import ROWS

    _known(names, ROWS, "rows")
    for name in names or ROWS:
        for number in range(ROWS[name].seeds) if seed is None else (seed,):
            cell = RESULTS / f"{name}-{number}.json"
            if cell.is_file() and not again:
                continue
            began = time.monotonic()
            figures = ROWS[name].measure(number)
            _write(cell, {"figures": figures, "seconds": round(time.monotonic() - began)})
            click.echo(f"{name} seed {number}: " + "  ".join(f"{key} {value:.2f}" for key, value in figures.items()))
    _write_page()


@main.command()
@click.argument("names", metavar="[SET]...", nargs=-1)
@click.option("--approach", "approaches", multiple=True, help="Only this one; may be repeated.")
@click.option("--seeds", default=5, show_default=True, help="Drawings of each set.")
@click.option("--again", is_flag=True, help="Also measure what has a result.")
def domains(names: tuple[str, ...] = (), approaches: tuple[str, ...] = (), seeds: int = 5, again: bool = False) -> None:
    """The automatic search beside fixed recipes, an SVM and an oracle, by default on all small data sets."""
    from quality.domains import APPROACHES, DOMAINS, measure

    _known(names, DOMAINS, "sets")
    _known(approaches, APPROACHES, "approaches")
    for number in range(seeds):
        for name in names or DOMAINS:
            for approach in approaches or APPROACHES:
                cell = _domain_cell(name, number, approach)
                if cell.is_file() and not again:
                    continue
                try:
                    found = measure(name, approach, number)
                except FileNotFoundError as exc:
                    click.echo(f"{name} is left out: {exc}")
                    break
                _write(cell, found)
                click.echo(f"{name} seed {number}, {approach}: {found['test']:.1f} in {found['seconds']:.0f} s")
    _write_page()


@main.command()
@click.argument("names", metavar="[SET]...", nargs=-1)
@click.option("--seed", "seeds", type=int, multiple=True, help="Only this drawing; may be repeated.")
@click.option("--again", is_flag=True, help="Also measure what has a result.")
def trust(names: tuple[str, ...] = (), seeds: tuple[int, ...] = (), again: bool = False) -> None:
    """Coverage of prediction sets, images turned away, and wrong labels found."""
    from quality.trust import SETS, measure

    _known(names, SETS, "sets")
    for seed in seeds or TRUST_SEEDS:
        for name in names or SETS:
            cell = _trust_cell(name, seed)
            if cell.is_file() and not again:
                continue
            try:
                found = measure(name, seed)
            except FileNotFoundError as exc:
                click.echo(f"{name} is left out: {exc}")
                continue
            _write(cell, found)
            click.echo(f"{name} seed {seed}: " + "  ".join(f"{key} {value:.1f}" for key, value in found.items()))
    _write_page()


def _trust_cell(name: str, seed: int) -> Path:
    return RESULTS / "trust" / f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}.json"


def _known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise click.UsageError(f"unknown {what}: {', '.join(unknown)}; choose from {', '.join(known)}")


def _write(cell: Path, result: dict[str, Any]) -> None:
    cell.parent.mkdir(parents=True, exist_ok=True)
    part = cell.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.rename(cell)


def _write_page() -> None:
    TABLE.write_text(table() + domains_table() + trust_table(), encoding="utf-8")
    click.echo(f"{TABLE.name} written")


def domains_table() -> str:
    """The results of `domains`, as Markdown."""
    from quality.domains import APPROACHES, DOMAINS

    def cell(name: str, approach: str, figure: str) -> str:
        paths = (_domain_cell(name, number, approach) for number in range(10))
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        values = [one[figure] for one in found if figure in one]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread} ({len(values)})" if values else "not measured"

    lines = [
        "", "## The automatic search on small data sets", "",
        DOMAINS_INTRODUCTION, "",
        f"| set | images | goal | {' | '.join(APPROACHES)} | its recipe, other seeds |",
        "|---|---|---" + "|---" * len(APPROACHES) + "|---|",
    ]  # fmt: skip
    for name, domain in DOMAINS.items():
        goal = f"{domain.goal:g}" if domain.goal else ""
        cells = " | ".join(cell(name, approach, "test") for approach in APPROACHES)
        reseeded = cell(name, "oracle", "reseeded")
        lines.append(f"| {name} | {domain.each} a class | {goal} | {cells} | {reseeded} |")
    lines += ["", GAP_INTRODUCTION, "", "| set | auto | no regularization |", "|---|---|---|"]
    lines += [f"| {name} | {cell(name, 'auto', 'gap')} | {cell(name, 'none', 'gap')} |" for name in DOMAINS]
    return "\n".join(lines) + "\n"


def trust_table() -> str:
    """The results of `trust`, as Markdown."""
    from quality.trust import SETS, WRONG

    def found(name: str) -> list[dict[str, Any]]:
        paths = (_trust_cell(name, seed) for seed in TRUST_SEEDS)
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]

    def mean(values: list[float], digits: int = 1) -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}" if values else "not measured"

    lines = [
        "", "## Trust", "", TRUST_INTRODUCTION, "",
        "| set | covered | expected | inside | size | empty | false alarms | other kinds | noise |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in SETS:
        cells = found(name)
        if not cells:
            lines.append(f"| {name} | not measured |" + " |" * 7)
            continue
        low, high = (statistics.mean(cell[side] for cell in cells) for side in ("low", "high"))
        inside = sum(cell["low"] <= cell["covered"] <= cell["high"] for cell in cells)
        kinds = [
            statistics.mean(cell[key] for key in cell if key.startswith("turned_away") and "noise" not in key)
            for cell in cells
        ]  # fmt: skip
        columns = [
            mean([cell["covered"] for cell in cells]), f"{low:.1f} to {high:.1f}", f"{inside} of {len(cells)}",
            mean([cell["size"] for cell in cells], 2),
            *(mean([cell[key] for cell in cells]) for key in ("empty", "false_alarms")),
            mean(kinds), mean([cell["turned_away_noise"] for cell in cells]),
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(columns)} |")
    lines += [
        "", LABELS_INTRODUCTION, "",
        "| set | named | precision | recall | test accuracy | without them |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in WRONG:
        keys = ("named", "precision", "recall", "test", "test_without")
        lines.append(f"| {name} | {' | '.join(mean([cell[key] for cell in found(name)]) for key in keys)} |")
    return "\n".join(lines) + "\n"


def _domain_cell(name: str, number: int, approach: str) -> Path:
    return RESULTS / "domains" / f"{name}-{number}-{approach.replace(', ', '-')}.json"


def table() -> str:
    """The page of results, as Markdown."""
    from quality.rows import ROWS

    lines = [
        "# Quality", "",
        INTRODUCTION, "",
        "| case | at least | measured | seeds |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, row in ROWS.items():
        cells = [
            json.loads(path.read_text(encoding="utf-8"))["figures"] for path in sorted(RESULTS.glob(f"{name}-?.json"))
        ]
        if not cells:
            lines.append(f"| {row.case} | {row.goal} | not measured | 0 |")
            continue
        measured = []
        for key in cells[0]:
            values = [cell[key] for cell in cells]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            measured.append(f"{key.replace('_', ' ')} {statistics.mean(values):.1f}{spread}")
        lines.append(f"| {row.case} | {row.goal} | {', '.join(measured)} | {len(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
