"""Which images are held out. Every class is held out in the same share."""

from collections.abc import Callable, Iterator

import numpy as np


def stratified(labels: np.ndarray, seed: int, held_out: Callable[[int], int]) -> np.ndarray:
    """Which images are held out, (n,) bool: of each class of n images `held_out(n)`, at random."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: held_out(len(members))]] = True
    return chosen


def stratified_folds(labels: np.ndarray, seed: int, count: int) -> Iterator[np.ndarray]:
    """Which images are held out in each fold, (n,) bool; each image once, every class spread evenly."""
    rng = np.random.default_rng(seed)
    fold = np.zeros(len(labels), int)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        fold[members] = np.arange(len(members)) % count
    for index in range(count):
        yield fold == index
