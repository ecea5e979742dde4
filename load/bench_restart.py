"""`python -m load.bench_restart`: how soon a restarted model server answers for what is asked, of 300 versions.

The embedded server starts anew in each round and is told to serve the base model and 15 models of 20 versions. In one
round a client asks at once for the base and for the version that would be loaded last; in the next one it waits until
a version is AVAILABLE before it asks, which is loading in order.
"""

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import click
import numpy as np

from load.bench_served import show
from serving.client import ModelServer
from serving.quiet import import_tensorflow
from serving.registry import BASE
from store.errors import ModelServerUnavailable, UnknownModel
from store.processes import end_with_parent

MODELS, VERSIONS = 15, 20
LAST = ("model-14", 1)  # loaded last: the newest versions come first
IMAGE = np.zeros((1, 784), np.uint8)
PATIENCE_S = 300.0
GOALS = {f"{LAST[0]}:{LAST[1]}": ">= 10x"}


@click.command()
@click.option("--rounds", default=3, help="Rounds, in each of which both ways have a turn.", show_default=True)
def main(rounds: int) -> None:
    """Measure the seconds from the configuration of a new server to its answers, and print each beside its goal."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        wanted = write_models(Path(folder) / "models")
        for number in range(rounds):
            for asks in (True, False) if number % 2 == 0 else (False, True):
                found[asks].append(restarted(Path(folder), wanted, asks))
    asked, in_order = ({name: median(one[name] for one in found[asks]) for name in found[asks][0]} for asks in found)
    rows = [
        [name, f"{seconds:.2f} s", f"{in_order[name]:.2f} s", f"{in_order[name] / seconds:.1f}x", GOALS.get(name, "")]
        for name, seconds in asked.items()
    ]
    title = f"first answers of a restarted server with {MODELS * VERSIONS + 1} versions; medians of {rounds}"
    show(title, ["", "asked for", "in order", "ratio", "goal"], rows)


def write_models(root: Path) -> dict[str, list[int]]:
    """Write the base and copies of it; return the versions by model, in the order in which they should be loaded."""
    import_tensorflow()
    from trainer.export import export
    from trainer.lenet import initial

    wanted = {BASE: [1]} | {f"model-{number:02}": list(range(VERSIONS, 0, -1)) for number in range(MODELS)}
    (root / BASE).mkdir(parents=True)
    export(root / BASE / "1", initial(10, 0), invert=False, manifest={})
    for model, versions in wanted.items():
        for version in versions if model != BASE else ():
            shutil.copytree(root / BASE / "1", root / model / f"{version}")
    return wanted


def restarted(folder: Path, wanted: dict[str, list[int]], asks: bool) -> dict[str, float]:
    """Seconds from the configuration of a new server to its answer for the base, for the last version and for all.

    Args:
        asks: ask at once; otherwise only when the version is AVAILABLE.
    """
    with running(folder / "socket") as server:
        began = time.perf_counter()
        took: dict[str, float] = {}

        def first_answer(name: str, model: str, version: int) -> None:
            until(lambda: asks or version in server.available(model))
            until(lambda: answers(server, model, version))
            took[name] = time.perf_counter() - began

        clients = [
            threading.Thread(target=server.reload, args=(folder / "models", wanted, PATIENCE_S)),
            threading.Thread(target=first_answer, args=("the base", BASE, 1)),
            threading.Thread(target=first_answer, args=(f"{LAST[0]}:{LAST[1]}", *LAST)),
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        until(lambda: all(server.available(model) == set(versions) for model, versions in wanted.items()))
        return took | {"all": time.perf_counter() - began}


def until(look: Callable[[], bool]) -> None:
    """Wait until `look` returns true."""
    began = time.monotonic()
    while not look():
        if time.monotonic() - began > PATIENCE_S:
            sys.exit(f"the server does not answer within {PATIENCE_S:g} s")
        time.sleep(0.01)


def answers(server: ModelServer, model: str, version: int) -> bool:
    """Tell whether the server predicts with this version."""
    with suppress(UnknownModel):
        return server.predict(model, version, IMAGE, PATIENCE_S).version == version
    return False


@contextmanager
def running(socket: Path) -> Iterator[ModelServer]:
    """Run an embedded model server that serves nothing yet."""
    command = [sys.executable, "-m", "serving", "--address", f"unix:{socket}", "--rest-address", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=end_with_parent)
    try:
        with ModelServer(f"unix:{socket}") as server:

            def listens() -> bool:
                with suppress(ModelServerUnavailable):
                    return not server.available(BASE)
                return False

            until(listens)
            yield server
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
