"""A version that is about to go live, and its comparison with `stable`, picture by picture."""

import functools
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from serving.publishing import files_of
from serving.registry import BASE, Registry, Version, stored_name
from store.errors import UnknownModel
from store.objects import objects_of
from store.records import GREY_28, DatasetCard, GateCard, ReportCard, owner_of, public_name
from store.settings import Settings
from trainer.export import load_params
from trainer.fit import Fitted
from trainer.gate import Comparison, Relabelled, fixed_conditions, not_compared, not_worse, same_classes
from trainer.jobs.datasets import Dataset
from trainer.jobs.duplicates import copies_of, near_copies
from trainer.network import Network
from trainer.spec import Gate, Spec
from trainer.worker.held_out import Predictions, digests
from trainer.worker.job_data import JobData, named

DAMAGED = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)  # of NumPy's files
MOST = 500  # images that go through the network of `stable`
MOST_BEFORE = 300  # of those that were held out for it, how many go through the new one
FEWEST_MOVED = 3  # images of a class that are of another one now, from which on it may mean something else


@dataclass(frozen=True)
class Image:
    """An image of an upload."""

    pixels: np.ndarray  # (28, 28) uint8
    label: str  # name of its class


Images = dict[bytes, Image]  # by digest


@dataclass(frozen=True)
class Candidate:
    """A version that is about to go live, and what it is judged by."""

    job: str
    gate: Gate
    card: ReportCard
    fitted: Fitted
    held_out: Predictions
    data: JobData
    base: Version  # that training began with
    inherited: Images  # that the base had learned, as far as they are still there

    @functools.cached_property
    def own(self) -> Images:
        """The images of its data, but for those of a test part."""
        return _images(self.data.dataset, self.data.validation)

    def warnings(self) -> list[str]:
        """That the base had learned some of the held-out images, if so."""
        if not self.inherited:
            return []
        held_out = _pixels(self.own[image] for image in self.held_out.images)
        count = int((copies_of(held_out, _pixels(self.inherited.values())) >= 0).sum())
        return [
            f"{count} of the {len(held_out)} held-out images, or near copies, were already learned by "
            f"{public_name(self.base.model)}:{self.base.version}, which training began with: accuracy on other images "
            "may be lower"
        ] if count else []  # fmt: skip

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
                    not_compared(f"it is not compared with {before}, which has other classes", passed=True, doubt=True)
                )
        return GateCard(
            passed=all(one.passed for one in conditions), compared_with=stable.version if stable else None,
            conditions=conditions, seconds=round(time.perf_counter() - began, 4), overrides=[],
        )  # fmt: skip

    def _beside(self, stable: Version, before: str, settings: Settings, registry: Registry) -> Comparison:
        """What both make of the pictures that were held out for either of them; near copies are one picture.

        Each answers with what it predicted when the picture was held out for it, which is right if it is what the data
        said then: wrong labels must not make both look alike. A picture that is not in the data of one goes through its
        network; where there are many, some do. Left out is what `stable`, or what it began with, has learned, and what
        this version began with has, but for pictures that were held out for `stable`: those are told apart.
        """
        assert self.card.validation is not None
        place, card = files_of(settings, stable.model, stable.version), stable.manifest.dataset
        now, then = self.held_out.by_image(), Predictions.load(place).by_image()
        own, old = self.own, _images(_upload(card, settings), _upload(card.validation if card else None, settings))
        inherited = inherited_by(stable, settings, registry)
        known = own | old | inherited | self.inherited
        picture = dict(zip(known, near_copies(_pixels(known.values())).tolist(), strict=True))

        learned_there = {picture[image] for image in [*(old.keys() - then.keys()), *inherited]}
        learned_here = {picture[image] for image in [*(own.keys() - now.keys()), *self.inherited]}
        out, theirs = learned_here | learned_there, {picture[image] for image in old}
        relabelled, moved = _relabelled(own, old, picture)
        here = {picture[image]: image for image in now if picture[image] not in out}
        there = {picture[image]: image for image in then if image in old and picture[image] not in learned_there}
        both = [one for one in here if one in there]
        new = _spread([one for one in here if one not in theirs], MOST)
        earlier = _spread([one for one in there if one not in here and one not in moved], MOST_BEFORE)

        right = {one: _is_right(now[here[one]]) for one in both + new}
        right |= _asked(lambda: self.fitted.network, earlier, there, old, then, invert=self.data.invert)
        right_before = {one: _is_right(then[there[one]]) for one in both + earlier}
        dark = stable.manifest.polarity == "dark_on_light"
        right_before |= _asked(lambda: Network(load_params(place)), new, here, own, now, invert=dark)
        compared = both + new + earlier

        def table(entry: Callable[[int], bool]) -> np.ndarray:
            return np.array([entry(one) for one in compared], bool)

        return Comparison(
            before, table(right.__getitem__), table(right_before.__getitem__),
            earlier=table(lambda one: one in there), taught=table(lambda one: one in learned_here),
            left_out=sum(picture[image] in out for image in now), relabelled=relabelled,
            own=self.card.validation, own_before=stable.report.validation,
        )  # fmt: skip


def gate_of(spec: Spec, model: str, registry: Registry) -> Gate:
    """The gate of a job: its own, that of the model, or the default."""
    return spec.gate or Gate.stored(registry.gate(model)) or Gate()


def learned_by(version: Version, settings: Settings, registry: Registry) -> Images:
    """The images that a version was trained on, and those that it has from what it started from.

    With folds it was trained on all images, and without on those that were not held out.
    """
    if version.model == BASE:
        return {}
    learned = _images(_upload(version.manifest.dataset, settings))
    if not version.manifest.trained_with.get("folds"):
        held_out = set(Predictions.load(files_of(settings, version.model, version.version)).images)
        learned = {image: one for image, one in learned.items() if image not in held_out}
    return learned | inherited_by(version, settings, registry)


def inherited_by(version: Version, settings: Settings, registry: Registry) -> Images:
    """The images that a version has learned from by what it started from, as far as that is still there."""
    model, _, number = (version.manifest.base or BASE).partition(":")
    if model == BASE:
        return {}
    try:
        base = named(f"{stored_name(owner_of(version.model), model)}:{number}", registry)
    except UnknownModel:  # removed since
        return {}
    return learned_by(base, settings, registry)


def _relabelled(own: Images, old: Images, picture: Mapping[bytes, int]) -> tuple[Relabelled, set[int]]:
    """What has changed of the pictures that two data sets share, and which are of another class in the first."""
    classes: dict[int, str] = {picture[image]: one.label for image, one in old.items()}
    shared, moved = Counter[str](), Counter[str]()  # by class in the earlier one
    pictures = set[int]()
    for image, one in own.items():
        if (before := classes.get(picture[image])) is not None:
            shared[before] += 1
            if one.label != before:
                moved[before] += 1
                pictures.add(picture[image])
    mostly = sorted(name for name, count in moved.items() if count >= FEWEST_MOVED and count > shared[name] / 2)
    return Relabelled(shared.total(), moved.total(), tuple(mostly)), pictures


def _is_right(answer: tuple[int, int]) -> bool:
    truth, predicted = answer
    return truth == predicted


def _spread(pictures: list[int], most: int) -> list[int]:
    """At most `most` of these, evenly spaced."""
    chosen = np.linspace(0, len(pictures) - 1, min(most, len(pictures))).astype(int)
    return [pictures[at] for at in chosen]


def _asked(
    network: Callable[[], Network], pictures: list[int], digest: Mapping[int, bytes], images: Images,
    truth: Mapping[bytes, tuple[int, int]], *, invert: bool,
) -> dict[int, bool]:  # fmt: skip
    """Whether a network classifies each of these pictures as the truth says."""
    if not pictures:
        return {}
    pixels = _pixels(images[digest[one]] for one in pictures) / np.float32(255)
    values = pixels.reshape(-1, *GREY_28.shape)
    predicted = network().logits(1 - values if invert else values).argmax(axis=1)
    return {one: bool(found == truth[digest[one]][0]) for one, found in zip(pictures, predicted, strict=True)}


def _pixels(images: Iterable[Image]) -> np.ndarray:
    """(n, 28, 28) uint8."""
    return np.stack([one.pixels for one in images])


def _upload(card: DatasetCard | None, settings: Settings) -> Dataset | None:
    """The images of a data set, if they are still there."""
    file = objects_of(settings).fetch(settings.datasets / card.file) if card else None
    return Dataset.load(file) if file and file.is_file() else None


def _images(*uploads: Dataset | None) -> Images:
    """Of equal ones the last."""
    return {
        one: Image(pixels, upload.classes[label])
        for upload in uploads if upload
        for one, pixels, label in zip(digests(upload.images), upload.images, upload.labels, strict=True)
    }  # fmt: skip
