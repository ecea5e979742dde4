"""Real handwritten digits that come with scikit-learn."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def all_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits, resized from 8x8 to 28x28: (n, 28, 28) uint8 light on dark, and their labels."""
    found = load_digits()
    small = np.rint(found.images / 16 * 255).astype(np.uint8)
    big = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR)) for image in small]
    return np.stack(big), found.target
