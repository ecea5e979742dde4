"""What is worth knowing of an upload before training on it: sizes, duplicates, images that show nothing."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from store.records import DatasetReport
from trainer.jobs.layouts import TEST, TRAIN, VALIDATION

FAINT = 8  # grey levels, of 255, that lie between the darkest and the lightest pixel of an image that shows something
MOST_LISTED = 20  # images, or groups of duplicates, that a report names
MOST_IN_GROUP = 10


def survey(
    images: np.ndarray, labels: Sequence[str], names: Sequence[str | int], sizes: Sequence[tuple[int, int]],
    parts: Sequence[str],
) -> DatasetReport:  # fmt: skip
    """Describe an upload.

    Args:
        images: (n, 28, 28) uint8, prepared.
        labels: the class of each.
        names: of each, its file, or its index in an array.
        sizes: of each, width and height in pixels as it was uploaded.
        parts: of each, the part of the data set that it belongs to.
    """

    def shown(index: int, **more: Any) -> dict[str, Any]:
        name = names[index]
        return {"file" if isinstance(name, str) else "index": name, "class": labels[index], **more}

    same: dict[bytes, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        same[image.tobytes()].append(index)
    groups = [group for group in same.values() if len(group) > 1]
    conflicts = [sum(labels[index] != labels[group[0]] for index in group) for group in groups]
    first = sorted(range(len(groups)), key=lambda i: conflicts[i] == 0)[:MOST_LISTED]
    flat = images.reshape(len(images), -1)
    spread = flat.max(axis=1).astype(int) - flat.min(axis=1)
    faint = np.flatnonzero(spread < FAINT)
    counts: dict[str, int] = defaultdict(int)
    for label, part in zip(labels, parts, strict=True):
        if part == TRAIN:
            counts[label] += 1
    by_pixels = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    return DatasetReport(
        classes=dict(counts),
        images=parts.count(TRAIN),
        validation_images=parts.count(VALIDATION),
        test_images=parts.count(TEST),
        smallest=by_pixels[0],
        largest=by_pixels[-1],
        sizes=len(by_pixels),
        duplicates=sum(len(group) - 1 for group in groups),
        conflicts=sum(conflicts),
        duplicate_groups=[[shown(index) for index in groups[i][:MOST_IN_GROUP]] for i in first],
        near_constant=len(faint),
        near_constant_images=[
            shown(int(index), reason=f"its pixels differ by {spread[index]} of 255") for index in faint[:MOST_LISTED]
        ],
    )
