"""`make bench`: run the benchmarks of predictions, training, search and time to served, and write docs/benchmarks.md.

Each measures Temper and the alternatives in one run, in which the sides take turns. The page has the machine, the
versions, the commands, and medians with the lowest and the highest of the rounds.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click

from load.figures import VARIABLE, Figures, noted

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PACKAGES = ("tensorflow", "keras", "torch", "fastapi", "grpcio", "litserve", "numpy")
BENCHMARKS = {
    "predict": ["load.bench_predict", "--rounds", "{rounds}"],
    "train": ["load.bench_train", "--rounds", "{rounds}"],
    "search": ["load.bench_search", "--rounds", "{rounds}"],
    "served": ["load.bench_served", "--rounds", "{rounds}"],
}
TEXT = """# Benchmarks

Written by `{command}` on {date}. Do not edit it: the next run replaces it. [speed.md](speed.md) explains what was found
and how.

{machine}. Load average of the machine before the run: {load:.1f}. {versions}.

Each comparison is one run in which the sides take turns, so that a noisy machine is noisy for all of them. Medians of
{rounds} rounds, with the lowest and the highest; the bars of the pictures have the same. The ratio says how many times
as fast Temper is as the alternative.

The sides: `temper` is `POST /predict` with JSON, `temper-bytes` with raw bytes, `temper-v1` TensorFlow Serving's REST
route; `plain` is a SavedModel behind FastAPI as most people would write it, `litserve` the same with LitServe's
batches. `keras fit` trains the same net on the same batches.
"""


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds of every benchmark.")
@click.option(
    "--only", type=click.Choice(list(BENCHMARKS)), multiple=True, help="Run these, and keep the page.  [default: all]"
)
def main(rounds: int, only: Sequence[str]) -> None:
    """Run the benchmarks one after another (half an hour on two cores), and write docs/benchmarks.md."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures"
        file.touch()
        commands = []
        for name in only or BENCHMARKS:
            words = [word.format(rounds=rounds) for word in BENCHMARKS[name]]
            commands.append(f".venv/bin/python -m {' '.join(words)}")
            click.echo(f"\n{commands[-1]}", err=True)
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", *words], env={**os.environ, VARIABLE: str(file)}, cwd=ROOT, check=False
            )
            if done.returncode:
                raise click.ClickException(f"{words[0]} ended with {done.returncode}; {PAGE.name} stays as it was")
            click.echo(f"took {time.monotonic() - began:.0f} s", err=True)
        found = noted(file)
    if only:
        return
    parts = [
        TEXT.format(
            command="make bench" if rounds == 5 else f".venv/bin/python -m load.bench --rounds {rounds}",
            date=time.strftime("%Y-%m-%d"), machine=_machine(), load=load, versions=_versions(), rounds=rounds,
        )
    ]  # fmt: skip
    for title, figures in found.items():
        picture = f"benchmarks/{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.svg"
        (PAGE.parent / picture).parent.mkdir(exist_ok=True)
        draw(title, figures, PAGE.parent / picture)
        parts.append(f"\n## {title}\n\n![{title}]({picture})\n\n{table(figures)}\n")
    parts.append("\n## Commands\n\n" + "".join(f"- `{command}`\n" for command in commands))
    PAGE.write_text("".join(parts), encoding="utf-8")
    click.echo(f"wrote {PAGE.relative_to(ROOT)}", err=True)


def table(figures: Sequence[Figures]) -> str:
    """A Markdown table of one comparison."""
    others = [one for one in figures if one.is_alternative]
    unit = figures[0].unit
    lines = [
        f"| | {unit} | lowest to highest |" + "".join(f" of {one.side} |" for one in others),
        "|---|---|---|" + "---|" * len(others),
    ]
    for one in figures:
        ratios = "".join(f" {times_as_fast(one, other):.2f}x |" if one is not other else " |" for other in others)
        lines.append(
            f"| {one.side} | {_shown(median(one.values))} | {_shown(min(one.values))} to {_shown(max(one.values))} "
            f"|{ratios}"
        )
    return "\n".join(lines)


def times_as_fast(one: Figures, other: Figures) -> float:
    """How many times as fast a side is as another one."""
    ratio = median(one.values) / median(other.values)
    return 1 / ratio if one.less_is_better else ratio


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(title: str, figures: Sequence[Figures], path: Path) -> None:
    """Draw medians as bars, with lines from the lowest to the highest round."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = title  # the same figures give the same file
    from matplotlib import pyplot

    height = 0.9 + 0.42 * len(figures)
    figure, axes = pyplot.subplots(figsize=(7.2, height), layout="constrained")
    middles = [median(one.values) for one in figures]
    spread = [
        [middle - min(one.values) for one, middle in zip(figures, middles, strict=True)],
        [max(one.values) - middle for one, middle in zip(figures, middles, strict=True)],
    ]
    colours = ["#8a8f98" if one.is_alternative else "#2f6fde" for one in figures]
    bars = axes.barh([one.side for one in figures], middles, xerr=spread, color=colours, height=0.62,
                     error_kw={"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3})  # fmt: skip
    most = max(max(one.values) for one in figures)
    for bar, one, middle in zip(bars, figures, middles, strict=True):
        axes.text(
            max(one.values) + 0.015 * most, bar.get_y() + bar.get_height() / 2, _shown(middle), va="center", size=9
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * most)
    axes.set_xlabel(f"{figures[0].unit} ({'less' if figures[0].less_is_better else 'more'} is better)", size=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _machine() -> str:
    """Processor, cores and memory."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine(),
    )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
