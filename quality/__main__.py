"""`make quality`: measure the rows and seeds without a result, and write the table.

Every result is a file, `quality/results/<row>-<seed>.json`, so an interrupted run resumes where it stopped.
"""

import json
import statistics
import time
from pathlib import Path

import click

from serving.quiet import import_tensorflow

RESULTS, TABLE = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "quality.md"

INTRODUCTION = """\
The results of `make quality`, in percent: the mean over the seeds and the standard deviation. Settings were chosen on
training images that were held out. `first` means the first 1,000 test images of the file, `drawn` means 1,000 drawn at
random: in copies of MNIST that are sorted by class, the first are nearly all zeros.

Fashion-MNIST is Debian's package `dataset-fashion-mnist`. MNIST comes from keras.datasets, or from the file that
`TEMPER_MNIST` names. The recipes are in [`quality/rows.py`](../quality/rows.py), the single results in
[`quality/results`](../quality/results)."""


@click.command()
@click.argument("rows", nargs=-1)
@click.option("--seed", type=int, help="Only this seed.")
@click.option("--again", is_flag=True, help="Also measure what has a result.")
def main(rows: tuple[str, ...], seed: int | None, again: bool) -> None:
    """Measure ROWS, by default all."""
    import_tensorflow()
    from quality.rows import ROWS

    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        raise click.UsageError(f"unknown rows: {', '.join(unknown)}; choose from {', '.join(ROWS)}")
    RESULTS.mkdir(exist_ok=True)
    for name in rows or ROWS:
        for number in range(ROWS[name].seeds) if seed is None else (seed,):
            cell = RESULTS / f"{name}-{number}.json"
            if cell.is_file() and not again:
                continue
            began = time.monotonic()
            figures = ROWS[name].measure(number)
            result = {"figures": figures, "seconds": round(time.monotonic() - began)}
            part = cell.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            part.rename(cell)
            click.echo(f"{name} seed {number}: " + "  ".join(f"{key} {value:.2f}" for key, value in figures.items()))
    TABLE.write_text(table(), encoding="utf-8")
    click.echo(f"{TABLE.name} written")


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
