"""What a version predicted on the images that were held out for it, which it carries along."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np

from store.records import GREY_28
from trainer.network import BATCH
from trainer.report import HeldOut
from trainer.worker.job_data import JobData

HELD_OUT = "assets.extra/held_out.npz"
DIGEST_BYTES = 16


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
