"""The pretrained LeNet-5, from which fine-tunes start."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.client import ModelServer
from serving.publishing import Probe, exclusive, publish, seal, withdraw
from serving.registry import BASE, Registry
from store.errors import ModelServerError
from store.records import GREY_28, Manifest, ReportCard
from store.settings import Settings
from trainer.export import digest, export
from trainer.lenet import Arrays
from trainer.network import Network
from trainer.worker.job_data import PARITY_IMAGES


def publish_base(settings: Settings, registry: Registry, servers: Sequence[ModelServer]) -> None:
    """Publish the pretrained LeNet-5 as version 1 of `lenet5`, unless it is there.

    Raises:
        ModelServerUnavailable: nothing was done.
    """
    with exclusive(settings, registry, "base"):
        if registry.has_live(BASE):
            return
        _check_any_answers(servers)  # first, because a number that is given is not given again
        for version in registry.of_job(BASE):
            withdraw(settings, registry, servers, BASE, version.version)
        params, card = pretrained()
        classes = [str(digit) for digit in range(10)]
        manifest = Manifest.model_validate({"classes": classes, "base": None, "sha256": digest(params), **card})
        pixels = np.random.default_rng(0).integers(0, 256, (PARITY_IMAGES, GREY_28.pixels), np.uint8)
        logits = Network(params).logits((pixels / np.float32(255)).reshape(-1, *GREY_28.shape))
        staged = settings.staging / BASE
        shutil.rmtree(staged, ignore_errors=True)
        export(staged, params, invert=False, manifest=manifest.dump())
        Probe(pixels, logits).save(staged)
        seal(staged)
        publish(
            settings, registry, servers,
            staged=staged, model=BASE, job_id=BASE, manifest=manifest,
            report=lambda: ReportCard.model_validate(card),
        )  # fmt: skip


def _check_any_answers(servers: Sequence[ModelServer]) -> None:
    absent: ModelServerError | None = None
    for server in servers:
        try:
            server.states(BASE)
            return
        except ModelServerError as exc:
            absent = exc
    if absent:
        raise absent


def pretrained() -> tuple[Arrays, dict[str, Any]]:
    """Parameters of the pretrained LeNet-5, and its card: where they come from."""
    folder = Path(__file__).parents[1] / "base"
    with np.load(folder / "lenet5.npz") as arrays:
        return dict(arrays), json.loads((folder / "lenet5.json").read_text(encoding="utf-8"))
