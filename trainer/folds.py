"""Which images are held out: the same share of every class, and near copies of an image together with it.

If a copy of it were among the images that are trained on, the accuracy on an image would say nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np


def stratified(
    labels: np.ndarray, seed: int, held_out: Callable[[int], int], groups: np.ndarray | None = None
) -> np.ndarray:
    """Which images are held out, (n,) bool: of each class of n images `held_out(n)`, at random.

    Args:
        groups: (n,) int; images with the same number are held out together, so it may be a few more or less. A class
            that is a single group is split all the same: without any image of it the rest says nothing either.
    """
    out: dict[int, bool] = {}  # by group
    numbers, classes = _classes(labels, seed, groups)
    for sizes in classes:
        left = held_out(sizes.total()) - sum(size for group, size in sizes.items() if out.get(group))
        new = [group for group in sizes if group not in out]
        for group in new:
            out[group] = sizes[group] <= left
            left -= sizes[group] if out[group] else 0
        if left > 0 and len(sizes) > 1 and new and not any(out[group] for group in sizes):
            out[min(new, key=sizes.__getitem__)] = True
    return np.array([out[group] for group in numbers], bool)


def stratified_folds(
    labels: np.ndarray, seed: int, count: int, groups: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Which images are held out in each fold, (n,) bool; each image once, every class spread evenly.

    There are fewer folds than `count` where there are too few groups to fill them.

    Args:
        groups: as above.
    """
    fold: dict[int, int] = {}  # by group
    numbers, classes = _classes(labels, seed, groups)
    for sizes in classes:
        images = [0] * count  # of this class, in each fold
        for group, size in sorted(sizes.items(), key=lambda one: -one[1]):
            at = fold.setdefault(group, images.index(min(images)))
            images[at] += size
    of_image = np.array([fold[group] for group in numbers])
    for index in range(count):
        if (held_out := of_image == index).any():
            yield held_out


def _classes(labels: np.ndarray, seed: int, groups: np.ndarray | None) -> tuple[list[int], list[Counter[int]]]:
    """The group of each image, and for each class how many of its images are in each group, in random order."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(len(labels)) if groups is None else groups
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    if groups is not None:
        numbers = groups.copy()
        for some in members:
            if len(set(groups[some].tolist())) == 1:
                numbers[some] = groups.max() + 1 + some
    return numbers.tolist(), [Counter(numbers[some].tolist()) for some in members]
