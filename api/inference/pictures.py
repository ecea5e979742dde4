"""28x28 pictures in JSON: as numbers, or as PNG in data URLs."""

import base64
import io

import numpy as np
from PIL import Image

FOR, AGAINST = (201, 79, 16), (24, 120, 200)  # colours of what speaks for a class and against it
FADED = 0.35  # contrast of the image beneath


def png(pixels: np.ndarray) -> str:
    """A data URL of pixels (height, width) or (height, width, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def grey(image: np.ndarray) -> np.ndarray:
    """An image (28, 28) in [0, 1] as uint8."""
    return (image * np.float32(255)).round().clip(0, 255).astype(np.uint8)


def overlay(image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """Signed saliency (28, 28) in colours over a faded image (28, 28) in [0, 1]; (28, 28, 3) uint8.

    The strongest pixel has the full colour.
    """
    strength = np.abs(saliency)[..., None] / max(float(np.abs(saliency).max()), 1e-12)
    ground = 255 * (0.5 + FADED * (image[..., None] - 0.5))
    colour = np.where(saliency[..., None] > 0, np.array(FOR), np.array(AGAINST))
    mixed: np.ndarray = (1 - strength) * ground + strength * colour
    return mixed.round().astype(np.uint8)
