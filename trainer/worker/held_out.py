"""What versions predict on images that were held out, and the comparison of a new one with `stable` on these."""

import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np
import tensorflow as tf

from serving.registry import BASE, Registry, Version, stored_name
from store.errors import UnknownModel
from store.records import GREY_28, DatasetCard, GateCard, ReportCard, owner_of, public_name
from store.settings import Settings
from trainer.duplicates import near_copies
from trainer.export import load_params
from trainer.fit import Fitted
from trainer.gate import Comparison, fixed_conditions, not_compared, not_worse, same_classes
from trainer.jobs.datasets import Dataset
from trainer.network import BATCH, Network
from trainer.report import HeldOut
from trainer.spec import Gate, Spec
from trainer.worker.job_data import JobData, named

HELD_OUT = "assets.extra/held_out.npz"
DIGEST_BYTES = 16
DAMAGED = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)  # of NumPy's files
MOST = 1000  # images that go through the network of `stable`
MOST_COMPARED = 5000  # images that versions are compared on
MOST_BEFORE = 500  # of those that were held out for it, how many go through the new one


@dataclass(frozen=True)
class Predictions:
    """What a version predicted on the images that were held out for it; every version carries its own."""

    images: list[bytes]  # digests of their pixels
    truth: np.ndarray  # (n,) int32, positions of classes
    predicted: np.ndarray  # (n,) int32

    @classmethod
    def of(cls, held_out: HeldOut, data: JobData) -> Self:
        """Those that a report rests on."""
        split = held_out.split
        parts = (split.images[at : at + BATCH] for at in range(0, len(split.labels), BATCH))
        images = [one for part in parts for one in digests(data.as_sent(part))]
        return cls(images, split.labels.astype(np.int32), held_out.logits.argmax(axis=1).astype(np.int32))

    def by_image(self) -> dict[bytes, tuple[int, int]]:
        """The true and the predicted class of each image, by its digest; of equal ones the last."""
        return dict(zip(self.images, zip(self.truth.tolist(), self.predicted.tolist(), strict=True), strict=True))

    def save(self, version: Path) -> None:
        """Write them into the directory of a version."""
        images = np.frombuffer(b"".join(self.images), np.uint8).reshape(-1, DIGEST_BYTES)
        np.savez(version / HELD_OUT, allow_pickle=False, images=images, truth=self.truth, predicted=self.predicted)

    @classmethod
    def load(cls, version: Path) -> Self:
        """Read those of a version; none of one from an earlier release."""
        try:
            with np.load(version / HELD_OUT, allow_pickle=False) as arrays:
                return cls([one.tobytes() for one in arrays["images"]], arrays["truth"], arrays["predicted"])
        except FileNotFoundError:
            return cls([], np.empty(0, np.int32), np.empty(0, np.int32))


def digests(images: np.ndarray) -> Iterator[bytes]:
    """A digest of the pixels of each image, uint8 of any shape with 784 of them."""
    pixels = np.ascontiguousarray(images).reshape(-1, GREY_28.pixels)
    return (blake2b(one.data, digest_size=DIGEST_BYTES).digest() for one in pixels)


def learned_before(held_out: Predictions, base: Version, settings: Settings, registry: Registry) -> list[str]:
    """The warning that what training began with had learned some of the held-out images, if so and still known."""
    learned = _learned_by(base, settings, registry)
    count = sum(image in learned for image in held_out.images)
    return [
        f"{count} of the {len(held_out.images)} held-out images were already learned by "
        f"{public_name(base.model)}:{base.version}, which training began with: accuracy on other images may be lower"
    ] if count else []  # fmt: skip


def gate_of(spec: Spec, model: str, registry: Registry) -> Gate:
    """The gate of a job: its own, that of the model, or the default."""
    return spec.gate or Gate.stored(registry.gate(model)) or Gate()


@dataclass(frozen=True)
class Candidate:
    """A version that is about to go live, and what it is judged by."""

    job: str
    gate: Gate
    card: ReportCard
    fitted: Fitted
    held_out: Predictions
    data: JobData
    base: Version  # that it started from

    def judge(self, stable: Version | None, settings: Settings, registry: Registry) -> GateCard:
        """The outcome of the gate beside the version that `stable` stands for, if there is one."""
        began = time.perf_counter()
        conditions, gate = list(fixed_conditions(self.gate, self.card)), self.gate
        if stable is not None and stable.job_id == self.job:  # its own preview
            stable = None
        if stable is None:
            if gate.not_worse:
                conditions.append(not_compared("there is no version to compare it with", passed=True))
        else:
            before = f"{public_name(stable.model)}:{stable.version}"
            known = self.data.classes == stable.manifest.classes
            if gate.same_classes:
                conditions.append(same_classes(self.data.classes, before, stable.manifest.classes))
            if gate.not_worse and known:
                try:
                    conditions.append(not_worse(self._beside(stable, before, settings, registry)))
                except (*DAMAGED, tf.errors.OpError) as exc:
                    why = f"it cannot be compared with {before}, whose files are missing or damaged"
                    conditions.append(not_compared(f"{why}: {type(exc).__name__}", passed=False))
            elif gate.not_worse and not gate.same_classes:
                conditions.append(
                    not_compared(f"it is not compared with {before}, which has other classes", passed=True)
                )
        return GateCard(
            passed=all(one.passed for one in conditions), compared_with=stable.version if stable else None,
            conditions=conditions, seconds=round(time.perf_counter() - began, 4), overrides=[],
        )  # fmt: skip

    def _beside(self, stable: Version, before: str, settings: Settings, registry: Registry) -> Comparison:
        """What both make of the images that were held out for either of them, each image and its near copies once.

        Each answers with what it predicted when the image was held out for it, which is right if it is what the data
        said then: wrong labels must not make both look alike. An image that was not held out for one goes through its
        network, unless that was trained on it or a near copy; it is left out then. So is one that either has from what
        it started from. To save time, networks are asked for some of the images where there are many.
        """
        assert self.card.validation is not None
        place, data = settings.version(stable.model, stable.version), self.data
        now, then = self.held_out.by_image(), Predictions.load(place).by_image()
        card = stable.manifest.dataset
        trained_on = _by_digest(_upload(card, settings))
        old = trained_on | _by_digest(_upload(card.validation if card else None, settings))
        own = _by_digest(data.dataset, data.validation)
        inherited = _inherited(stable, settings, registry) | _learned_by(self.base, settings, registry)
        learned = trained_on.keys() - then.keys() | inherited

        both = [image for image in now if image in then and image not in learned]
        new = _spread([image for image in now if image not in then and image not in learned], MOST)
        others = [image for image in then if image in old and image not in own and image not in inherited]
        earlier = _spread(others, MOST_BEFORE)
        dark = stable.manifest.polarity == "dark_on_light"
        ours = {image: now[image][1] == now[image][0] for image in both + new}
        ours |= _asked(lambda: self.fitted.network, earlier, old, then, invert=data.invert)
        theirs = {image: then[image][1] == then[image][0] for image in both + earlier}
        theirs |= _asked(lambda: Network(load_params(place)), new, own, now, invert=dark)

        seen = [one.pixels for image, one in trained_on.items() if image in learned]
        seen += [one.pixels for image, one in own.items() if image not in now]
        images = _without_copies(_spread(both + new + earlier, MOST_COMPARED), own | old, seen)
        right, right_before, was_held_out = (
            np.array([known[image] for image in images], bool)
            for known in (ours, theirs, {image: image in then for image in images})
        )
        shared = own.keys() & old.keys()
        return Comparison(
            before, right, right_before, was_held_out, left_out=sum(image in learned for image in now),
            shared=len(shared), relabelled=sum(own[image].label != old[image].label for image in shared),
            own=self.card.validation, own_before=stable.report.validation,
        )  # fmt: skip


@dataclass(frozen=True)
class _Image:
    """An image of an upload."""

    pixels: np.ndarray  # (28, 28) uint8
    label: str  # name of its class


def _without_copies(
    images: list[bytes], known: Mapping[bytes, _Image], learned: list[np.ndarray]
) -> list[bytes]:  # fmt: skip
    """The images without near copies of earlier ones, which are no further evidence, and of learned ones.

    Args:
        images: digests.
        known: each of them, and others.
        learned: pixels of images that one of the two was trained on.
    """
    if not images:
        return []
    groups = near_copies(np.stack([*(known[image].pixels for image in images), *learned]))
    taken = set(groups[len(images) :].tolist())
    _, first = np.unique(groups[: len(images)], return_index=True)
    return [images[at] for at in first if int(groups[at]) not in taken]


def _spread(images: list[bytes], most: int) -> list[bytes]:
    """At most `most` of these, evenly spaced."""
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    return [images[at] for at in chosen]


def _asked(
    network: Callable[[], Network], images: list[bytes], known: Mapping[bytes, _Image],
    truth: Mapping[bytes, tuple[int, int]], *, invert: bool,
) -> dict[bytes, bool]:  # fmt: skip
    """Whether a network classifies each of these images, given as digests, as the truth says."""
    if not images:
        return {}
    pixels = np.stack([known[image].pixels for image in images]) / np.float32(255)
    values = pixels.reshape(-1, *GREY_28.shape)
    predicted = network().logits(1 - values if invert else values).argmax(axis=1)
    return {image: bool(one == truth[image][0]) for image, one in zip(images, predicted, strict=True)}


def _upload(card: DatasetCard | None, settings: Settings) -> Dataset | None:
    """The images of a data set, if they are still there."""
    file = settings.datasets / card.file if card else None
    return Dataset.load(file) if file and file.is_file() else None


def _by_digest(*uploads: Dataset | None) -> dict[bytes, _Image]:
    """Each image by its digest; of equal ones the last."""
    return {
        one: _Image(pixels, upload.classes[label])
        for upload in uploads if upload
        for one, pixels, label in zip(digests(upload.images), upload.images, upload.labels, strict=True)
    }  # fmt: skip


def _inherited(version: Version, settings: Settings, registry: Registry) -> set[bytes]:
    """The images that a version has learned from by what it started from, as far as that is still there."""
    model, _, number = (version.manifest.base or BASE).partition(":")
    if model == BASE:
        return set()
    try:
        base = named(f"{stored_name(owner_of(version.model), model)}:{number}", registry)
    except UnknownModel:  # removed since
        return set()
    return _learned_by(base, settings, registry)


def _learned_by(version: Version, settings: Settings, registry: Registry) -> set[bytes]:
    """The images that a version was trained on, and those that it has from what it started from."""
    if version.model == BASE:
        return set()
    upload = _upload(version.manifest.dataset, settings)
    return set(digests(upload.images) if upload else ()) | _inherited(version, settings, registry)
