"""Near copies among images: re-encoded, brightened, slightly noisy or shifted in grey, but the same picture.

The correlation of all pixels decides. Of images as vectors of mean zero and length one it is their product, so blocks
of a matrix product compare all with all. A perceptual hash (Zauner 2010) with a search tree takes as long, and misses
some where there are many copies.
"""

import numpy as np

ALIKE = 0.99  # correlation of the pixels of two near copies; different pictures of a kind stay below it
MOST = 20_000  # different images among which near copies are looked for, which takes 2 to 3 s
BLOCK = 512  # images that are compared with all others at a time
COARSE = 7  # pixels of a side, in the small versions that are compared first


def near_copies(images: np.ndarray) -> np.ndarray:
    """The group of each image, (n,) int: near copies have the same number, groups are numbered as they first appear.

    Copies of copies are in one group. Of more than `MOST` images only equal ones are found.

    Args:
        images: (n, 28, 28) uint8.
    """
    numbers: dict[bytes, int] = {}  # of different images
    same = np.array([numbers.setdefault(image.tobytes(), len(numbers)) for image in images])
    _, first = np.unique(same, return_index=True)
    found = _alike(_unit(images[first]))[same] if len(first) <= MOST else same
    _, appears, inverse = np.unique(found, return_index=True, return_inverse=True)
    number: np.ndarray = np.argsort(np.argsort(appears))[inverse]
    return number


def copies_of(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Of each image, the original that it is most like if it is a near copy of that, (n,) int; -1 if of none.

    Args:
        images, originals: (n, 28, 28) uint8.
    """
    found = np.full(len(images), -1)
    if len(originals):
        ours, theirs = _unit(images), _unit(originals)
        for at in range(0, len(images), BLOCK):
            correlation = ours[at : at + BLOCK] @ theirs.T
            found[at : at + BLOCK] = np.where(correlation.max(axis=1) >= ALIKE, correlation.argmax(axis=1), -1)
    return found


def _unit(images: np.ndarray) -> np.ndarray:
    """Images as vectors of mean zero and length one, (n, pixels) float32; constant ones all as the same."""
    pixels = images.reshape(len(images), -1).astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    length = np.linalg.norm(pixels, axis=1, keepdims=True)
    pixels[length[:, 0] < 1e-3] = 1.0
    pixels /= np.where(length < 1e-3, np.sqrt(pixels.shape[1]), length)
    return pixels


def _alike(pixels: np.ndarray) -> np.ndarray:
    """The group of each of some different images, (n,) int."""
    from scipy.sparse import coo_array  # for those who look for copies, and not for a gateway
    from scipy.sparse.csgraph import connected_components

    group = np.arange(len(pixels))
    coarse = pixels.reshape(-1, COARSE, 28 // COARSE, COARSE, 28 // COARSE).mean(axis=(2, 4)).reshape(len(pixels), -1)
    coarse *= 28 / COARSE  # a projection, in which near copies are at least as near
    half = (coarse**2).sum(axis=1) / 2
    for at in range(0, len(pixels), BLOCK):
        part = slice(at, at + BLOCK)
        near = coarse[part] @ coarse[at:].T >= half[part, None] + half[at:] - (1 - ALIKE) - 1e-4
        np.fill_diagonal(near, val=False)
        rows = np.flatnonzero(near.any(axis=1))
        alike = pixels[at + rows] @ pixels[at:].T >= ALIKE  # with themselves and later ones
        alike[np.arange(len(rows)), rows] = False
        one, other = np.divmod(np.flatnonzero(alike), alike.shape[1])
        one = rows[one]
        if len(one):
            _, first = np.unique(group, return_index=True)
            ends = np.concatenate([one + at, np.arange(len(group))]), np.concatenate([other + at, first[group]])
            edges = coo_array((np.ones(len(ends[0]), bool), ends), shape=(len(group), len(group)))
            group = connected_components(edges, directed=False)[1]
    return group
