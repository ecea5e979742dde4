"""Near copies among images: re-encoded, brightened, slightly noisy or shifted in grey, but the same picture."""

import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ALIKE = 0.99  # correlation of the pixels of two near copies; different pictures of a kind stay below it
FREQUENCIES = 32  # of the cosine transform, by which neighbours are found
MOST = 20_000  # different images among which near copies are looked for
NEIGHBOURS = 16  # of an image that are compared with it, the nearest ones; copies of copies are joined
BLOCK = 512  # images whose neighbours are looked for at a time


def near_copies(images: np.ndarray) -> np.ndarray:
    """The group of each image, (n,) int: near copies have the same number, groups are numbered as they first appear.

    The lowest frequencies of the cosine transform are a perceptual hash (after Zauner 2010). Of images as vectors of
    mean zero and length one they are a projection, so two that correlate by `ALIKE` lie within a known distance there;
    of such pairs the correlation of all pixels decides. Of more than `MOST` images only equal ones are found: with so
    many a few near copies change no figure.

    Args:
        images: (n, h, w) uint8.
    """
    numbers: dict[bytes, int] = {}  # of different images
    same = np.array([numbers.setdefault(image.tobytes(), len(numbers)) for image in images])
    _, first = np.unique(same, return_index=True)
    found = _alike(images[first])[same] if len(first) <= MOST else same
    _, appears, inverse = np.unique(found, return_index=True, return_inverse=True)
    number: np.ndarray = np.argsort(np.argsort(appears))[inverse]
    return number


def _alike(images: np.ndarray) -> np.ndarray:
    """The group of each of some different images, (n,) int."""
    count = len(images)
    pixels = images.reshape(count, -1).astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    pixels /= np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-6)
    waves = dctn(pixels.reshape(-1, *images.shape[1:]), axes=(1, 2), norm="ortho")
    rows, columns = np.indices(images.shape[1:])
    lowest = np.argsort((rows + columns).ravel(), kind="stable")[1 : 1 + FREQUENCIES]
    places = waves.reshape(count, -1)[:, lowest]
    one, other = _near(places, 2 * (1 - ALIKE))
    alike = np.zeros(len(one), bool)
    for at in range(0, len(one), 1 << 16):
        part = slice(at, at + (1 << 16))
        alike[part] = np.einsum("nd,nd->n", pixels[one[part]], pixels[other[part]]) >= ALIKE
    edges = coo_array((np.ones(alike.sum()), (one[alike], other[alike])), shape=(count, count))
    group: np.ndarray = connected_components(edges, directed=False)[1]
    return group


def _near(places: np.ndarray, square: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of places, (n, d), whose squared distance is at most this, as two arrays of positions; not all of many.

    For some thousands of places multiplying all with all is twice as fast as a tree.
    """
    squares, ones, others = (places**2).sum(axis=1), list[np.ndarray](), list[np.ndarray]()
    for at in range(0, len(places), BLOCK):
        part = slice(at, at + BLOCK)
        far = squares[part, None] + squares[at:] - 2 * places[part] @ places[at:].T  # to itself and later ones
        near = far <= square + 1e-5
        for row in np.flatnonzero(near.sum(axis=1) > NEIGHBOURS):
            near[row] = False
            near[row, np.argpartition(far[row], NEIGHBOURS)[:NEIGHBOURS]] = True
        one, other = np.nonzero(near)
        ones.append(one + at)
        others.append(other + at)
    return np.concatenate(ones), np.concatenate(others)
