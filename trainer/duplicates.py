"""Near copies among images: re-encoded, brightened, slightly noisy or shifted in grey, but the same picture."""

import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

ALIKE = 0.99  # correlation of the pixels of two near copies; different pictures of a kind stay below it
FREQUENCIES = 32  # of the cosine transform, by which neighbours are found
MOST = 10_000  # different images among which near copies are looked for
NEIGHBOURS = 16  # of an image that are compared with it; copies of copies are joined


def near_copies(images: np.ndarray) -> np.ndarray:
    """The group of each image, (n,) int: near copies have the same number, groups are numbered as they first appear.

    The lowest frequencies of the cosine transform are a perceptual hash (after Zauner 2010). Of images as vectors of
    mean zero and length one they are a projection, so two that correlate by `ALIKE` lie within a known distance; a tree
    finds those pairs, and the correlation of all pixels decides. Of more than `MOST` images only equal ones are found:
    with so many a few near copies change no figure.

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
    _, found = cKDTree(places).query(places, k=NEIGHBOURS, distance_upper_bound=np.sqrt(2 * (1 - ALIKE)))
    one, other = np.repeat(np.arange(count), NEIGHBOURS), found.ravel()
    one, other = one[other < count], other[other < count]
    alike = np.zeros(len(one), bool)
    for at in range(0, len(one), 1 << 16):
        part = slice(at, at + (1 << 16))
        alike[part] = np.einsum("nd,nd->n", pixels[one[part]], pixels[other[part]]) >= ALIKE
    edges = coo_array((np.ones(alike.sum()), (one[alike], other[alike])), shape=(count, count))
    group: np.ndarray = connected_components(edges, directed=False)[1]
    return group
