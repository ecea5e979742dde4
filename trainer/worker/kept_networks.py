"""Save the networks of a job's final training after chosen epochs, and load them to publish one."""

from pathlib import Path

import numpy as np

from store.errors import JobFailed
from trainer.checkpoints import Checkpoint
from trainer.fit import Fitted, Start
from trainer.jobs.kept import epochs, file_of
from trainer.report import HeldOut, seen_by
from trainer.spec import Spec
from trainer.worker.job_data import JobData

PARAMS, TRAINED = "params/", "trained/"


def keep(folder: Path, network: int, fitted: Fitted) -> None:
    """Write a network down as it is after its last epoch. The same network gives the same file, byte for byte."""
    arrays = {f"{PARAMS}{name}": value for name, value in fitted.params.items()}
    arrays |= {f"{TRAINED}{name}": value for name, value in fitted.trained.items()}
    record = {
        "history": fitted.history, "gradient_shares": fitted.gradient_shares,
        "overfitted_epoch": fitted.overfitted_epoch,
    }  # fmt: skip
    Checkpoint(file_of(folder, network, fitted.kept_epoch)).save(lambda: (arrays, record), now=True)


def read(folder: Path, network: int, epoch: int, start: Start) -> Fitted:
    """A network as it was after an epoch.

    Raises:
        JobFailed: the file is gone or damaged.
    """
    found = Checkpoint(file_of(folder, network, epoch)).load()
    if found is None:
        raise JobFailed(f"the checkpoint of epoch {epoch} is gone or damaged; publish another one")
    arrays, record = found
    params, trained = (
        {name.removeprefix(part): value for name, value in arrays.items() if name.startswith(part)}
        for part in (PARAMS, TRAINED)
    )
    return Fitted(params, trained, start.method, start.lora_scale, kept_epoch=epoch, ended_by="checkpoint", **record)


def read_all(folder: Path, epoch: int, start: Start, spec: Spec, data: JobData) -> tuple[Fitted, HeldOut | None]:
    """The served network after an epoch, and with folds out-of-fold predictions of that epoch.

    A fold whose training was over by then, or stopped early, takes part with the nearest epoch that is kept of it.

    Raises:
        JobFailed: a file is gone or damaged.
    """
    served, folds = read(folder, 0, epoch, start), list(data.folds(spec)) if spec.folds else []
    if not folds:
        return served, None
    n, networks = len(data.all.labels), list[Fitted]()
    logits, distances = np.zeros((n, len(data.classes)), np.float32), np.zeros((n, 2), np.float32)
    for number, held_out in enumerate(folds, start=1):
        nearest = min(epochs(folder, number), key=lambda kept: abs(kept - epoch), default=epoch)
        networks.append(read(folder, number, nearest, start))
        logits[held_out], distances[held_out] = seen_by(networks[-1].params, data.part(~held_out), data.part(held_out))
    return served, HeldOut(data.all, logits, data.part(folds[0]), networks[0].params, distances, out_of_fold=True)
