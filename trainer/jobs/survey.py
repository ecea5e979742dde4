"""What is worth knowing of an upload before training on it: sizes, duplicates, images that show nothing."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.records import DatasetReport, Finding
from trainer.jobs.layouts import TEST, TRAIN, VALIDATION

FAINT = 8  # grey levels, of 255, that lie between the darkest and the lightest pixel of an image that shows something
MOST_LISTED = 20  # images, or groups of duplicates, that a report names
MOST_IN_GROUP = 10
MOST_IN_WORDS = 3  # images that the message of a finding names
WORDS = {  # kind: what the images are, and what to do
    "conflict": ("equal to one of another class", "Keep each picture in one class."),
    "leak": ("to validate or test on, and near copies of images to train on", "They are left out of every figure."),
    "blank_after_alpha": (
        "light on a transparent ground, which becomes white and leaves nothing to see",
        "Save them on a dark ground, without transparency.",
    ),
    "constant": ("with next to nothing on them", "Remove them unless they are what you mean."),
    "duplicate": ("equal to another one of their class", "They count twice; remove them unless that is meant."),
}


@dataclass(frozen=True)
class Seen:
    """What is known of an image besides its pixels."""

    name: str | int  # its file, or its index in an array
    label: str
    part: str
    size: tuple[int, int]  # width and height in pixels as it was uploaded
    blank: bool = False  # whether it showed something until its transparency became white

    def shown(self, **more: Any) -> dict[str, Any]:
        """As it is listed."""
        part = {} if self.part == TRAIN else {"part": self.part}
        return {"file" if isinstance(self.name, str) else "index": self.name, "class": self.label, **part, **more}


def spread(images: np.ndarray) -> np.ndarray:
    """Grey levels between the darkest and the lightest pixel of (..., h, w) images, (...)."""
    found: np.ndarray = images.max(axis=(-2, -1)).astype(int) - images.min(axis=(-2, -1))
    return found


def is_faint(images: np.ndarray) -> np.ndarray:
    """Whether each of (..., h, w) images shows next to nothing, (...) bool."""
    found: np.ndarray = spread(images) < FAINT
    return found


def survey(
    images: np.ndarray, seen: Sequence[Seen], copied: Sequence[int] = ()
) -> tuple[DatasetReport, list[Finding]]:  # fmt: skip
    """Describe an upload, and say what is wrong with it.

    Args:
        images: (n, 28, 28) uint8, prepared, of all parts.
        seen: each of them.
        copied: those to measure on that are near copies of training images, or equal to one.
    """
    same: dict[bytes, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        same[image.tobytes()].append(index)
    groups = [group for group in same.values() if len(group) > 1]
    conflicts = [sum(seen[index].label != seen[group[0]].label for index in group) for group in groups]
    first = sorted(range(len(groups)), key=lambda i: conflicts[i] == 0)[:MOST_LISTED]
    levels = spread(images)
    faint = np.flatnonzero(is_faint(images)).tolist()
    blank = [index for index in faint if seen[index].blank]
    parts = Counter(one.part for one in seen)
    by_pixels = sorted({one.size for one in seen}, key=lambda size: (size[0] * size[1], size))
    report = DatasetReport(
        classes=dict(Counter(one.label for one in seen if one.part == TRAIN)),
        images=parts[TRAIN],
        validation_images=parts[VALIDATION],
        test_images=parts[TEST],
        smallest=by_pixels[0],
        largest=by_pixels[-1],
        sizes=len(by_pixels),
        duplicates=sum(len(group) - 1 for group in groups),
        conflicts=sum(conflicts),
        duplicate_groups=[[seen[index].shown() for index in groups[i][:MOST_IN_GROUP]] for i in first],
        near_constant=len(faint),
        near_constant_images=[
            seen[index].shown(reason=f"its pixels differ by {levels[index]} of 255") for index in faint[:MOST_LISTED]
        ],
        blank_after_alpha=len(blank),
        blank_after_alpha_images=[seen[index].shown() for index in blank[:MOST_LISTED]],
    )
    unseen = set(faint)
    told = [group for group in groups if group[0] not in unseen]  # equal images are faint together
    return report, _findings(seen, told, blank, [index for index in faint if not seen[index].blank], copied)


def _findings(
    seen: Sequence[Seen], groups: Iterable[Sequence[int]], blank: list[int], constant: list[int], copied: Sequence[int]
) -> list[Finding]:
    """What is wrong with images, the worst first.

    Args:
        groups: of equal images that show something.
        blank, constant: images that show nothing, with and without transparency to blame.
    """
    found: dict[str, list[int]] = {kind: [] for kind in WORDS}
    found |= {"blank_after_alpha": blank, "constant": constant}
    for group in groups:
        by_class = {seen[index].label: index for index in reversed(group)}
        if len(by_class) > 1:
            leading = set(by_class.values())  # which come first, so that what is listed shows the conflict
            found["conflict"] += sorted(group, key=lambda index: index not in leading)
            continue
        trained_on = [index for index in group if seen[index].part == TRAIN]
        apart = [index for index in group if seen[index].part != TRAIN]
        found["leak" if trained_on else "duplicate"] += apart if trained_on else apart[1:]
        found["duplicate"] += trained_on[1:]
    named = {index for images in found.values() for index in images}
    found["leak"] += [index for index in copied if index not in named]
    return [_finding(kind, [seen[index] for index in images]) for kind, images in found.items() if images]


def _printable(name: str | int) -> str:
    """A file's name without what could steer a terminal."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in str(name))


def _finding(kind: str, images: Sequence[Seen]) -> Finding:
    what, advice = WORDS[kind]
    named = ", ".join(f"{_printable(one.name)} ({one.label})" for one in images[:MOST_IN_WORDS])
    more = f" and {len(images) - MOST_IN_WORDS} more" if len(images) > MOST_IN_WORDS else ""
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    return Finding(
        kind=kind, message=f"{count} {what}: {named}{more}. {advice}", images=len(images),
        listed=[one.shown() for one in images[:MOST_LISTED]],
    )  # fmt: skip
