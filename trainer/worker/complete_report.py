"""The costly part of a version's report card, worked out when no job waits."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from serving.publishing import files_of
from serving.registry import BASE, Registry
from store.errors import UnknownModel
from store.records import ReportCard, public_name
from store.settings import Settings
from trainer import report
from trainer.export import load_params
from trainer.fit import Split
from trainer.jobs.records import Job, Jobs
from trainer.lenet import Arrays
from trainer.network import Network
from trainer.synthetic_digits import synthetic_digits
from trainer.worker.job_data import FOLD, JobData, device_of, named, spec_of

FORGETTING_IMAGES = 500


def complete_report(job: Job, *, settings: Settings, jobs: Jobs, registry: Registry) -> Iterator[None]:
    """Work out the costly part of a report; yields wherever other work may come first.

    Raises:
        LeaseLost: another worker has taken it over.
    """
    assert job.version is not None
    try:
        version = registry.find(job.model, job.version)
    except UnknownModel:  # removed since
        jobs.reported(job, "none")
        return
    spec = spec_of(version.manifest)
    data = JobData.load(job.dataset, settings, spec, grouped=version.manifest.grouped)
    device = device_of("auto" if spec.device == "gpu" else spec.device)
    params = load_params(files_of(settings, job.model, job.version))
    with tf.device(device):
        _, unseen = data.split(spec)
        network = params
        if unseen is None:
            unseen = data.part(next(data.folds(spec)))
            with np.load(files_of(settings, job.model, job.version) / FOLD) as arrays:
                network = dict(arrays)
    steps = report.robustness(
        functools.partial(Network, network), unseen, report.epsilon_of(spec), settings.attack_images
    )
    found = None
    while found is None:
        yield
        with tf.device(device):  # not across the yield: other work comes with a device of its own
            found = next(steps)
    with tf.device(device):
        lost = forgetting(params, job.base, data.classes, settings, registry)
    card = version.report.dump()
    quick, attacked = card["robustness"], {**card["robustness"], **found}
    outdated = report.fgsm_flatters(spec, quick)
    warnings = [text for text in card["warnings"] if text not in outdated] + report.fgsm_flatters(spec, attacked)
    card |= {"robustness": attacked, "warnings": warnings, "forgetting": lost}
    complete = ReportCard.model_validate(card)
    registry.set_report(job.model, job.version, complete, lambda connection: jobs.reported(job, "complete", connection))


def forgetting(
    params: Arrays, base: str, classes: tuple[str, ...], settings: Settings, registry: Registry
) -> dict[str, Any] | None:
    """How much of the base's task is left; None where nothing of that task is there."""
    try:
        version = named(base, registry)
    except UnknownModel:  # removed since
        return None
    if version.model == BASE:
        source, (images, labels) = "synthetic digits", synthetic_digits(FORGETTING_IMAGES, seed=0)
        sample = Split(tf.constant(images), labels)
    else:
        spec = spec_of(version.manifest)
        if version.manifest.dataset is None:
            return None
        try:
            data = JobData.load(version.manifest.dataset, settings, spec, grouped=version.manifest.grouped)
        except FileNotFoundError:
            return None
        train, validation = data.split(spec)
        source = f"{'validation' if validation else 'training'} images of {public_name(base)}"
        sample = validation or train
        sample = Split(sample.images[:FORGETTING_IMAGES], sample.labels[:FORGETTING_IMAGES])
    before = load_params(files_of(settings, version.model, version.version))
    same = version.manifest.classes == classes
    return {"sample": source, **report.forgetting(params, before, sample, same_classes=same)}
