"""What a job works with: its images, its device, and the versions that it starts from."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import tensorflow as tf

from serving.registry import Registry, Version
from store.errors import DeviceUnavailable, InvalidDataset
from store.objects import objects_of
from store.records import GREY_28, DatasetCard, Manifest
from store.settings import Settings
from trainer.fit import Split
from trainer.folds import stratified, stratified_folds
from trainer.jobs.datasets import ALL_COPIES, Dataset
from trainer.jobs.duplicates import copies_of, near_copies
from trainer.jobs.layouts import TEST, VALIDATION
from trainer.lenet import Tensor
from trainer.spec import Spec

FOLD = "assets.extra/fold.npz"  # the network of the first fold, which the complete report attacks if all are trained on
LEAKS = 100  # most that are listed
PARITY_IMAGES = 16  # whose logits prove that what is served is what was trained


@dataclass(frozen=True)
class Named:
    """Some images of a data set, with what they are called."""

    dataset: Dataset
    positions: np.ndarray  # (n,) int, of these images in the data set
    labels: np.ndarray  # (n,) int32
    part: str = ""  # `validation` or `test`, if they were uploaded apart

    def named(self, index: int) -> dict[str, Any]:
        """An image in a report: its `position` in the prepared data set, and its `file`, or `index` in an array."""
        position = int(self.positions[index])
        name = self.dataset.names[position]
        part = {"part": self.part} if self.part else {}
        return {"position": position, "file" if isinstance(name, str) else "index": name, **part}


@dataclass(frozen=True)
class JobData:
    """A job's images and what is known of them."""

    dataset: Dataset
    validation: Dataset | None  # where it was uploaded apart
    polarity: str
    test: Dataset | None = None  # on which nothing is trained or chosen
    corrections: tuple[str, ...] = ()  # what each of the last images was taken for, before a user corrected it
    grouped: bool = True  # whether near copies are held out together

    @classmethod
    def load(cls, card: DatasetCard, settings: Settings, spec: Spec, *, grouped: bool = True) -> Self:
        """Load the images of an upload."""

        def load(part: DatasetCard) -> Dataset:
            return Dataset.load(objects_of(settings).fetch(settings.datasets / part.file))

        dataset = load(card)
        validation, test = (load(part) if part else None for part in (card.validation, card.test))
        polarity = card.polarity if spec.polarity == "auto" else spec.polarity
        return cls(dataset, validation, polarity, test, tuple(card.corrections), grouped)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs."""
        return self.dataset.classes

    @property
    def invert(self) -> bool:
        """Tell whether the foreground is darker than the background."""
        return self.polarity == "dark_on_light"

    def split(self, spec: Spec) -> tuple[Split, Split | None]:
        """Training and validation images: uploaded apart, or the same share of every class, or none of them."""
        if self.validation is not None:
            return self.all, self._apart(self.validation, VALIDATION)[1]
        if not spec.validation_split:
            return self.all, None
        chosen = self._split_off(spec)
        return self.part(~chosen), self.part(chosen)

    def _split_off(self, spec: Spec) -> np.ndarray:
        share = spec.validation_split
        return stratified(self.dataset.labels, spec.seed, lambda n: max(1, round(share * n)), self.groups)

    def folds(self, spec: Spec) -> Iterator[np.ndarray]:
        """Which images each fold holds out, (n,) bool."""
        return stratified_folds(self.dataset.labels, spec.seed, spec.folds or 0, self.groups)

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """Which images are near copies of one another, (n,) int; they are held out together."""
        return near_copies(self.dataset.images) if self.grouped else np.arange(len(self.dataset.images))

    @functools.cached_property
    def all(self) -> Split:
        """All images but those that were uploaded to validate on."""
        return self._ready(self.dataset)

    @functools.cached_property
    def copied(self) -> dict[str, np.ndarray]:
        """Of each image that was uploaded to measure on, a training image that it is a near copy of, or -1.

        It says nothing about other images, so it is left out of all figures. (n,) int by part, if that is there.
        """
        parts = {part: one.images for part, one in ((VALIDATION, self.validation), (TEST, self.test)) if one}
        if not self.grouped:
            return {part: np.full(len(images), -1) for part, images in parts.items()}
        return {part: copies_of(images, self.dataset.images) for part, images in parts.items()}

    def check(self) -> None:
        """Refuse validation images that are all copies of what is trained on.

        Raises:
            InvalidDataset: so that nothing can be measured.
        """
        copied = self.copied.get(VALIDATION)
        if copied is not None and (copied >= 0).all():
            raise InvalidDataset(ALL_COPIES.format(len(copied)), param=VALIDATION)

    @property
    def unseen(self) -> Split | None:
        """The test images, if there are any besides copies of what is trained on."""
        return self._apart(self.test, TEST)[1] if self.test and (self.copied[TEST] < 0).any() else None

    @property
    def everything(self) -> Named:
        """All images but those that were uploaded to measure on."""
        return Named(self.dataset, np.arange(len(self.dataset.labels)), self.all.labels)

    def measured(self, spec: Spec) -> Named:
        """The held-out images that a report rests on."""
        if self.validation is not None:
            return self._apart(self.validation, VALIDATION)[0]
        if not spec.validation_split:
            return self.everything
        chosen = np.flatnonzero(self._split_off(spec))
        return Named(self.dataset, chosen, self.all.labels[chosen])

    def _apart(self, dataset: Dataset, part: str) -> tuple[Named, Split]:
        """The images of a part that are measured on."""
        some = self.copied[part] < 0
        split = self._ready(dataset, some)
        return Named(dataset, np.flatnonzero(some), split.labels, part), split

    def leaks(self) -> dict[str, Any]:
        """Images to validate or test on that are near copies of some that are trained on, which are named with them."""
        count, listed, everything = 0, list[dict[str, Any]](), self.everything
        for dataset, part in ((self.validation, VALIDATION), (self.test, TEST)):
            if dataset is None:
                continue
            found = np.flatnonzero(self.copied[part] >= 0)
            there = Named(dataset, np.arange(len(dataset.labels)), dataset.labels, part)
            count += len(found)
            listed += [
                {**there.named(index), "class": dataset.classes[dataset.labels[index]],
                 "copy_of": everything.named(int(self.copied[part][index]))}
                for index in found[: LEAKS - len(listed)]
            ]  # fmt: skip
        return {"images": count, "listed": listed}

    def part(self, some: np.ndarray) -> Split:
        """Some of these, (n,) bool."""
        return self._ready(self.dataset, some)

    def as_sent(self, images: Tensor) -> np.ndarray:
        """Images, (n, 28, 28, 1), as a client would send them, (n, 784) uint8."""
        values: np.ndarray = np.asarray(images).reshape(-1, GREY_28.pixels)
        return np.rint(255 * (1.0 - values if self.invert else values)).astype(np.uint8)

    def _ready(self, dataset: Dataset, some: np.ndarray | slice = slice(None)) -> Split:
        images = (dataset.images[some] / np.float32(255))[..., None]
        labels = np.array([self.classes.index(name) for name in dataset.classes], np.int32)[dataset.labels[some]]
        return Split(tf.constant(1.0 - images if self.invert else images), labels)


def device_of(wanted: str) -> str:
    """The device for `auto`, `cpu` or `gpu`.

    Raises:
        DeviceUnavailable: there is no GPU.
    """
    gpus = tf.config.list_logical_devices("GPU")
    if wanted == "gpu" and not gpus:
        raise DeviceUnavailable("the spec asks for a GPU, and TensorFlow sees none", param="spec.device")
    return "/GPU:0" if gpus and wanted != "cpu" else "/CPU:0"


def named(name: str, registry: Registry) -> Version:
    """The live version `name:version`."""
    model, _, number = name.partition(":")
    return registry.find(model, int(number))


def spec_of(manifest: Manifest) -> Spec:
    """The spec that a version was trained with."""
    return Spec.model_validate_json(json.dumps(manifest.trained_with))
