"""`python -m load.bench_search`: what an automatic fine-tune costs, beside one recipe and in seconds until it is live.

In this process: a search of 32 recipes with its folds and the training of its choice, beside one run of 60 epochs of
`full` with five folds on the same images. Through a warm service: from the upload of 300 and of 1,000 digits until the
default search's version is live, the first version of a model, with its preview; and a search with a bound of time.
"""

import json
import time
from collections.abc import Sequence
from statistics import median

import click
import httpx
import numpy as np

from demo import service
from load.bench_served import PATIENCE_S, answer, digits, packed, show
from load.figures import note
from serving.quiet import import_tensorflow

RECIPES, GOAL, AIM = 32, 4.0, 2.0
LIVE_S = {300: 15.0, 1000: 45.0}  # goals
BOUND_S, WITHIN = 20.0, 0.1
POLL_S = 0.1  # more often would take time from the search


@click.command()
@click.option("--images", default=300, show_default=True, help="Images of the comparison in this process.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of it; the sides take turns.")
def main(images: int, rounds: int) -> None:
    """Measure both, and print each figure beside its goal."""
    import_tensorflow()
    beside_one_recipe(images, rounds)
    through_a_service()


def beside_one_recipe(count: int, rounds: int) -> None:
    """Print seconds and their ratio."""
    import tensorflow as tf

    from trainer.asked import parse_asked
    from trainer.fit import Split
    from trainer.folds import stratified_folds
    from trainer.parallel import side_by_side
    from trainer.recipes import FULL
    from trainer.search import Problem, search, training
    from trainer.spec import Spec
    from trainer.worker.pretrained import pretrained

    images, labels = digits(count, seed=0)
    data = Split(tf.constant((images / np.float32(255))[..., None]), labels.astype(np.int32))
    problem = Problem(data, pretrained()[0], 10, same_classes=False)
    asked = parse_asked(json.dumps({"search": {"trials": RECIPES}}))

    def run(spec: Spec, folds: int) -> float:
        began = time.perf_counter()
        parts = [data, *(problem.part(~held_out) for held_out in stratified_folds(data.labels, 0, folds))]
        list(side_by_side(lambda part, check: training(spec, problem, part).finish(check), parts))
        return time.perf_counter() - began

    one, searched, trials = [], [], []
    run(asked.resolve({**FULL, "epochs": 1}), 2)  # compiles
    for _ in range(rounds):
        one.append(run(asked.resolve(FULL), 5))
        began = time.perf_counter()
        found = search(asked, problem)
        trials.append(time.perf_counter() - began)
        searched.append(trials[-1] + run(found.spec, found.spec.folds or 0))
    title = f"A search of {RECIPES} recipes on {count} images"
    note(title, "search, folds and training of its choice", searched, "s")
    note(title, "the search of these", trials, "s")
    note(title, "one recipe with five folds", one, "s", is_alternative=True)
    ratio = median(a / b for a, b in zip(searched, one, strict=True))
    rows = [
        ("one `full` run of 60 epochs, five folds", f"{median(one):.1f}", ""),
        (f"search of {RECIPES} recipes", f"{median(trials):.1f}", ""),
        (
            "  with the folds and training of its choice",
            f"{median(searched):.1f}",
            f"{ratio:.2f}x <= {GOAL:g}x ({AIM:g}x)",
        ),
    ]
    show(f"{count} images, medians of {rounds}", ("", "seconds", "goal"), rows)


def through_a_service() -> None:
    """Print seconds from upload to live."""
    rows: list[Sequence[str]] = []
    with service() as api:
        fine_tune(api, 300, 7, "warm-up")  # compiles, as a worker has that has run any search
        for count, goal in LIVE_S.items():
            total, preview = fine_tune(api, count, 0, f"first-{count}")
            rows.append((f"{count} images, live", f"{total:.1f}", f"<= {goal:g}"))
            rows.append(("  preview, live", f"{preview:.1f}", "<= 2"))
        total, _ = fine_tune(api, 1000, 1, "bounded", {"search": {"seconds": BOUND_S, "preview": False}})
        rows.append((f"1,000 images in `seconds` {BOUND_S:g}, live", f"{total:.1f}", f"<= {BOUND_S * (1 + WITHIN):g}"))
    show("from upload to live", ("", "seconds", "goal"), rows)


def fine_tune(api: httpx.Client, count: int, seed: int, model: str, spec: object = None) -> tuple[float, float]:
    """Seconds until the version is live, and until its preview is (0 without)."""
    images, labels = digits(count, seed)
    fields = {"model": model} | ({"spec": json.dumps(spec)} if spec else {})
    began, preview = time.perf_counter(), 0.0
    job = answer(api.post("/finetune", files={"data": ("digits.npz", packed(images, labels))}, data=fields))
    while job["finished_at"] is None:
        if time.perf_counter() - began > 10 * PATIENCE_S:
            raise click.ClickException(f"job {job['id']} does not end")
        time.sleep(POLL_S)
        job = answer(api.get(f"/finetune/{job['id']}"))
        if job["preview_version"] and not preview:
            preview = time.perf_counter() - began
    if job["status"] != "succeeded":
        raise click.ClickException(f"the job {job['status']}: {job['error']}")
    return time.perf_counter() - began, preview


if __name__ == "__main__":
    main()
